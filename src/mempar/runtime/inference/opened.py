"""Opening a checkpoint to read from it: one process has the whole model, whatever layout wrote it.

    with open_model(find_checkpoint(path)) as opened:
        opened.forward.logits(tokens)

There is no optimizer, no gradient buffer, and nothing is drawn that is then overwritten. Of several processes each has
a model of its own, and they are ranks of one world: what they compute does not depend on each other.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime import bringup
from mempar.runtime.bringup import World
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import DTYPE_BYTES, Manifest, read_manifest
from mempar.runtime.config import DTYPES, CheckpointConfig, KernelsConfig, ParallelConfig, RunConfig
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.host_memory import available_bytes
from mempar.runtime.in_flight import InFlight
from mempar.runtime.inference.forward import Forward
from mempar.runtime.inference.mapping import map_readers
from mempar.runtime.inference.shortage import explained_shortage
from mempar.runtime.inference.tokens import encoder_of, num_tokens_of, padded_vocab
from mempar.runtime.inference.weights import read_weights
from mempar.runtime.model import Model, build_for_reading
from mempar.runtime.placement import resolve
from mempar.runtime.tables import access_through, make_tables

Tables = Literal["auto", "memory", "mapped"]
# Of the memory that is free: tables that take more stay in their files.
_SHARE_OF_MEMORY = 0.5


def check_tables(tables: str) -> Tables:
    """Check where tables shall be, as --tables says it.

    Raises:
        ConfigError: for a place that is none.
    """
    for known in get_args(Tables):
        if tables == known:
            return known
    raise ConfigError(f"--tables {tables} is not known; it is one of {', '.join(get_args(Tables))}; use one of these.")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that was opened from a checkpoint.

    Attributes:
        checkpoint: where it lies.
        run: the run that wrote it, in the layout of this process: every size is 1.
        manifest: of the checkpoint.
        model: the model; `model.tables` has the tables that were loaded, none that are mapped.
        world: the ranks, each with a model of its own.
        vocab_size: V, tokens of the tokenizer.
        tables: where tables are, `memory` or `mapped`.
        forward: its forward pass.
    """

    checkpoint: Path
    run: RunConfig
    manifest: Manifest
    model: Model
    world: World
    vocab_size: int
    tables: Tables
    forward: Forward

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.world.device

    @property
    def max_length(self) -> int:
        """Tokens of a sequence in training."""
        return self.run.train.seq_length

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The tokenizer.

        Raises:
            ConfigError: when it cannot be loaded, or is seen to be another one than the checkpoint's; see `encoder_of`.
        """
        return encoder_of(self.manifest, self.run)


@contextmanager
def open_model(checkpoint: Path, *, tables: Tables = "auto", dtype: str = "") -> Iterator[OpenedModel]:
    """Open a checkpoint; joins the world if this process has not, and leaves it as it was.

    Args:
        checkpoint: a checkpoint, see `find_checkpoint`.
        tables: `memory` loads them, comparing checksums; `mapped` leaves them in their files, unchecked (see
            mapping.py); `auto` maps those of a model whose tables take more than half of the memory that is free.
        dtype: to compute in, one of `float64`, `float32`, `bf16`; empty for that of training. Tables stay in the type
            that they were saved in, in memory and mapped, be it wider or narrower: rows are summed in it.

    Raises:
        CheckpointError: when the checkpoint is damaged.
        ConfigError: for settings that are none.
    """
    manifest = read_manifest(checkpoint)
    saved = read_config(manifest)
    run = _reading_run(saved, dtype)
    joined = dist.is_initialized()
    if not joined:
        # One process is all it takes, whatever job its environment is of.
        bringup.join_world(alone=True)
    try:
        run = resolve(run, dist.get_world_size())
        world = bringup.lay_out(run)
        try:
            with explained_shortage(str(checkpoint)):
                yield _open(checkpoint, run, saved.train.dtype, manifest, world, tables)
        finally:
            bringup.tear_down(world)
    finally:
        if not joined:
            dist.destroy_process_group()


def _open(
    checkpoint: Path, run: RunConfig, saved_dtype: str, manifest: Manifest, world: World, tables: Tables
) -> OpenedModel:
    embeddings = padded_vocab(manifest)
    num_tokens = num_tokens_of(run, embeddings)
    if tables == "auto":
        tables = "memory" if table_bytes(manifest, run) <= _SHARE_OF_MEMORY * _free_bytes(world.device) else "mapped"
    in_flight = InFlight(runs_again=False)
    if tables == "memory":
        # Those of float64 have no setting of their own: their type is that of the training that made them.
        as_saved = replace(run, train=replace(run.train, dtype=saved_dtype))
        loaded, access = make_tables(as_saved, world, in_flight, draws=False)
    else:
        loaded = []
        readers = {name: map_readers(manifest, run, name, world.backend) for name in run.memories}
        access = {name: access_through(found, run, world, name, in_flight) for name, found in readers.items()}
    model = build_for_reading(run, world, embeddings, in_flight=in_flight, tables=loaded, access=access)
    read_weights(manifest, model)
    return OpenedModel(
        checkpoint=checkpoint,
        run=run,
        manifest=manifest,
        model=model,
        world=world,
        vocab_size=num_tokens,
        tables=tables,
        forward=Forward(model, run, world, num_tokens),
    )


def table_bytes(manifest: Manifest, run: RunConfig) -> int:
    """Bytes of all tables of a checkpoint, in memory as in its files."""
    names = [f"{name}.{part}" for name, memory in run.memories.items() for part in memory.table_names]
    records = [manifest.tensors[name] for name in names if name in manifest.tensors]
    return sum(prod(record.shape) * DTYPE_BYTES[record.dtype] for record in records)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _reading_run(saved: RunConfig, dtype: str) -> RunConfig:
    """The run that reads what another one wrote: in one process, with nothing that is for training alone."""
    if dtype not in ("", *DTYPES):
        raise ConfigError(f"dtype={dtype} is not known; it is one of {', '.join(DTYPES)}; use one of these.")
    train = replace(saved.train, dtype=dtype or saved.train.dtype, recompute="none", trace_steps=0)
    return replace(
        saved,
        train=train,
        memory=_reading_memory(saved, saved.memory, train.dtype),
        more_memories=tuple(_reading_memory(saved, memory, train.dtype) for memory in saved.more_memories),
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(),
        kernels=KernelsConfig(),
    )


def _reading_memory(saved: RunConfig, memory: MemoryConfig, dtype: str) -> MemoryConfig:
    """A memory with its table in the type that it was saved in, and without what only updates ask for."""
    stored = saved.table_dtype_of(memory)
    return replace(
        memory,
        dtype="" if stored == "float64" else stored,
        # float64 is for exact comparisons, scores included.
        score_dtype="float32" if dtype == "float64" else memory.score_dtype,
        rounding="master",
        moments_dtype="float32",
    )
