"""Rows of a checkpoint's tensors in blocks, as they lie in its files: what is read is read once, and checked."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mempar.runtime.checkpoint.boxes import Box
from mempar.tools.convert.checkpoint_source import CheckpointSource


def row_blocks(
    source: CheckpointSource, name: str, advance: Callable[[int], None], limit: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Read rows of a tensor, block after block.

    Args:
        source: the checkpoint.
        name: of the tensor.
        advance: is told how many more of the rows that `rows_wanted` says were read.
        limit: rows at the most, the first ones of blocks that lie evenly over the tensor; 0 for all.

    Yields:
        The first row's number, and the rows `[rows, ...]`.

    Raises:
        CheckpointError: when a piece is damaged.
    """
    record = source.tensors[name]
    for start, stop, wanted in _chosen(source.cuts(name), limit):
        rows = torch.empty(stop - start, *record.shape[1:], dtype=getattr(torch, record.dtype))
        offset = (start,) + (0,) * (len(record.shape) - 1)
        source.read(
            Box(name=name, dtype=record.dtype, shape=record.shape, offset=offset, sizes=tuple(rows.shape)), rows
        )
        yield start, rows[:wanted]
        advance(wanted)


def rows_wanted(source: CheckpointSource, name: str, limit: int = 0) -> int:
    """How many rows `row_blocks` yields."""
    return sum(wanted for _, _, wanted in _chosen(source.cuts(name), limit))


def _chosen(cuts: list[int], limit: int) -> list[tuple[int, int, int]]:
    """Blocks of rows, first and last one, and how many of each are wanted."""
    blocks = list(itertools.pairwise(cuts))
    num_rows = cuts[-1] - cuts[0]
    if not limit or limit >= num_rows:
        return [(start, stop, stop - start) for start, stop in blocks]
    number = min(len(blocks), limit, -(-limit * len(blocks) // num_rows))
    chosen = [blocks[place * len(blocks) // number] for place in range(number)]
    # Blocks may be of unequal sizes: what some lack, others do not make up for.
    shares = [limit * (place + 1) // number - limit * place // number for place in range(number)]
    return [(start, stop, min(share, stop - start)) for (start, stop), share in zip(chosen, shares, strict=True)]
