"""Bands: rows of a tensor that are read and written together, and what of them belongs to whom."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mempar.dims import even_cuts
from mempar.runtime.checkpoint.boxes import Box, row_blocks
from mempar.runtime.checkpoint.manifest import TensorRecord


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows of a tensor, and what ranks save of it.

    Attributes:
        name: of the tensor.
        record: its dtype and shape.
        first: row.
        last: end of the rows.
        shares: rank, part of the tensor, and the rows of a block if it belongs to a table.
    """

    name: str
    record: TensorRecord
    first: int
    last: int
    shares: list[tuple[int, Box, int]]

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return prod(self.record.shape[1:]) * getattr(torch, self.record.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Of all its rows."""
        return (self.last - self.first) * self.row_bytes


def spread(firsts: Sequence[int], parts: int) -> Iterator[int]:
    """Take from several stretches in turn: those who write at the same time to one file wait for each other."""
    cuts = even_cuts(len(firsts), parts)
    for of_parts in itertools.zip_longest(*(firsts[start:stop] for start, stop in itertools.pairwise(cuts))):
        yield from (first for first in of_parts if first is not None)


def bands(cuts: list[int], row_bytes: int, band_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows between cuts, as long as a band may be, and one at least."""
    start = 0
    for cut, after in itertools.pairwise([*cuts, cuts[-1]]):
        if cut > start and (after == cut or (after - start) * row_bytes > band_bytes):
            yield start, cut
            start = cut


def band_box(span: Span, first: int, last: int) -> Box:
    """Some rows of a tensor."""
    shape = span.record.shape
    return Box(
        name=span.name,
        dtype=span.record.dtype,
        shape=shape,
        offset=(first, *(0 for _ in shape[1:])) if shape else (),
        sizes=(last - first, *shape[1:]) if shape else (),
    )


def blocks_of(share: Box, band: Box, block_rows: int) -> Iterator[Box]:
    """What a rank's part and a band have in common, cut in row blocks."""
    meeting = share.overlap(band)
    if meeting is None:
        return
    mine, _ = meeting
    offset = tuple(at + part.start for at, part in zip(share.offset, mine, strict=True))
    sizes = tuple(part.stop - part.start for part in mine)
    yield from row_blocks(replace(share, offset=offset, sizes=sizes), block_rows)


def part_of(numbers: Tensor, band: Box, block: Box) -> Tensor:
    """What a band's numbers are in a block inside it."""
    mine, _ = band.overlap(block) or ((), ())
    return numbers[mine]


def shaped(room: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor at the beginning of some room."""
    return room[: prod(sizes) * dtype.itemsize].view(dtype).view(sizes)
