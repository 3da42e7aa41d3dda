"""Loading a checkpoint into any layout, with every byte of it checked by some rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.runtime.bringup import World
from mempar.runtime.checkpoint.accept import open_checkpoint
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.dense import DenseTarget
from mempar.runtime.checkpoint.manifest import HISTORY_SINCE, Manifest, Piece
from mempar.runtime.checkpoint.names import stored_name, weights_of_master
from mempar.runtime.checkpoint.reading import Reader
from mempar.runtime.checkpoint.tables import table_parts
from mempar.runtime.checkpoint.together import do_together, on_main
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers


def open_together(path: Path, run: RunConfig, world: World) -> Manifest:
    """Let the main rank look at a checkpoint, and all ranks have its manifest; every rank must call it.

    Raises:
        CheckpointError: on every rank, when the run cannot go on from it; see `open_checkpoint`.
    """
    return on_main(world, None, lambda said: open_checkpoint(path, run))


def load_checkpoint(manifest: Manifest, world: World, model: Model, optimizers: Optimizers) -> None:
    """Read a checkpoint into this layout; every rank must call it.

    A rank reads the pieces that overlap what it holds; pieces that nobody asks for are checked all the same,
    shared out over the ranks.

    Args:
        manifest: of the checkpoint, of any layout.
        world: the ranks.
        model: parameters and tables, overwritten.
        optimizers: moments and step counts, overwritten.

    Raises:
        CheckpointError: on every rank, when a file is damaged, or the checkpoint lacks what the run needs.
    """
    reader = Reader(manifest)
    read_part = _WithFreshState(reader, manifest).read if manifest.weights_only else reader.read
    with_history = [memory for memory in optimizers.histories if memory in manifest.about.get(HISTORY_SINCE, {})]
    dense = DenseTarget(model, optimizers)
    shards = [(box, tensor) for _, _, box, tensor in table_parts(model.tables, optimizers, with_history)]
    unread = _unread_pieces(manifest, world, dense.names | {box.name for box, _ in shards})

    def read() -> None:
        for path, piece in unread[world.rank :: world.size]:
            reader.check_piece(path, piece)
        dense.read(read_part)
        for box, tensor in shards:
            read_part(box, tensor)

    # What follows needs all ranks.
    do_together(world, read)
    applied_steps = manifest.progress["applied_steps"]
    dense.apply(applied_steps)
    for table in model.tables:
        optimizers.tables[table.name].step = applied_steps
    for memory, history in optimizers.histories.items():
        history.step = manifest.step
        if memory not in with_history:
            history.last_read.zero_()


class _WithFreshState:
    """Weights from a checkpoint that holds nothing else, and an optimizer's state as it is before the first step."""

    def __init__(self, reader: Reader, manifest: Manifest) -> None:
        self._reader, self._tensors = reader, manifest.tensors

    def read(self, box: Box, target: Tensor) -> None:
        if box.name in self._tensors:
            self._reader.read(box, target)
            return
        weights = weights_of_master(box.name)
        if weights is None:
            # Moments and sums of squares.
            target.zero_()
            return
        stored = self._tensors[weights]
        numbers = torch.empty(box.sizes, dtype=getattr(torch, stored.dtype))
        self._reader.read(replace(box, name=weights, dtype=stored.dtype), numbers)
        target.copy_(numbers)


def _unread_pieces(manifest: Manifest, world: World, wanted: set[str]) -> list[tuple[str, Piece]]:
    """The pieces of tensors that no rank asks for, and those that are no tensors."""
    of_ranks: list[Any] = [None] * world.size
    dist.all_gather_object(of_ranks, {stored_name(name, manifest.tensors) for name in wanted})
    read = set().union(*of_ranks)
    return [(path, piece) for path, piece in manifest.pieces() if piece.box is None or piece.box.name not in read]
