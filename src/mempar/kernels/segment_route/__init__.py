"""The roads of entries to the owners of their rows, and of sums and gradients between tokens and columns.

A read is one weighted row of one token; an entry is a read, or several of one token that chose the same slot. Entries
stand owner by owner, token by token, in the order of their reads or, merged, of their rows: an owner can sum token by
token. The tables of `Route` turn numbers of reads into numbers of entries and back. The second pair of operations cuts
`[T, D]` into contiguous pieces of columns, and puts it together again from partial sums.

Nothing here knows who the owners are or sends anything; parallel/exchange.py does. All results are the same on every
backend, bit for bit where numbers are moved, and do not vary: sums are in a fixed order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.kernels.checks import check_range, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.segment_route import native

# Reads and entries of one rank are numbered in 32 bits.
_MOST_READS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Route:
    """The entries of some tokens `[T, M]`, bucketed by owner.

    Attributes:
        row_index: `[E] int32`, row within the owner's shard.
        counts: `[R, T]`, entries of each token for each owner, in the dtype that `count_dtype` chooses; None when
            every token has M entries with one owner.
        sizes: entries for each owner.
        read_order: `[T*M] int32`, the reads, in the order of their entries; None when it is their own.
        entry_of_read: `[T*M] int32`, the way back; None likewise.
        offsets: `[E + 1] int32`, where the reads of each entry start in `read_order`; None when each has one.
        backend: what computes.
    """

    row_index: Tensor
    counts: Tensor | None
    sizes: list[int]
    read_order: Tensor | None
    entry_of_read: Tensor | None
    offsets: Tensor | None
    backend: Backend

    def to_entries(self, per_read: Tensor) -> Tensor:
        """Turn numbers of reads into numbers of entries.

        Args:
            per_read: `[T, M]` or `[T*M]`.

        Returns:
            `[E]`; reads that share an entry are added in their order, in float32 at least.
        """
        if self.entry_of_read is not None:
            fits = per_read.numel() == self.entry_of_read.numel()
            require(fits, "per_read", per_read, f"a number for each of {self.entry_of_read.numel()} reads")
        flat = per_read.reshape(-1).contiguous()
        if self.read_order is None:
            return flat
        if self.offsets is None:
            return flat.index_select(0, self.read_order)
        if self.backend.is_triton:
            from mempar.kernels.segment_route import fused

            return fused.add_reads(flat, self.read_order, self.offsets)
        return native.add_reads(flat, self.read_order, self.offsets)

    def to_reads(self, per_entry: Tensor) -> Tensor:
        """Give every read the number of its entry.

        Args:
            per_entry: `[E]`, or `[N*E]`: N parts, one after the other, that are added first to last, in float32
                at least.

        Returns:
            `[T*M]`.
        """
        num_entries = self.row_index.numel()
        fits = per_entry.numel() % num_entries == 0 < per_entry.numel() if num_entries else not per_entry.numel()
        require(fits, "per_entry", per_entry, f"one or more numbers for each of {num_entries} entries")
        parts = per_entry.reshape(-1, num_entries).contiguous() if num_entries else per_entry.reshape(1, 0)
        # One part is one gather, which torch does as well.
        if self.backend.is_triton and len(parts) > 1:
            from mempar.kernels.segment_route import fused

            return fused.spread_entries(parts, self.entry_of_read)
        return native.spread_entries(parts, self.entry_of_read)


def count_dtype(reads: int) -> torch.dtype:
    """The dtype of per-token counts up to M reads: one byte where M allows it, else two."""
    return torch.uint8 if reads <= 255 else torch.int16


def route(slot_index: Tensor, row_cuts: Tensor, *, merge: bool = False, backend: Backend) -> Route:
    """Bucket the entries of some tokens by owner.

    Args:
        slot_index: `[T, M] int32 or int64`.
        row_cuts: `[R + 1] int64`, boundaries of the owners' rows, where the slots lie: a copy made here would make
            the host wait.
        merge: whether reads of a token that chose the same slot become one entry.
        backend: what computes it.

    Returns:
        The entries in owner order. With several owners, or merging, the host waits for their numbers, once (twice
        where torch merges on a GPU).

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a slot is out of range; looked for if the backend checks indices.
    """
    _check_slots(slot_index, row_cuts, backend)
    if row_cuts.numel() == 2 and not merge:
        return Route(
            row_index=slot_index.reshape(-1).int(),
            counts=None,
            sizes=[slot_index.numel()],
            read_order=None,
            entry_of_read=None,
            offsets=None,
            backend=backend,
        )
    if backend.is_triton:
        from mempar.kernels.segment_route import fused

        found = fused.bucket(slot_index.contiguous(), row_cuts, merge)
    else:
        found = native.bucket(slot_index, row_cuts, merge)
    sizes = found.counts.sum(1).tolist()
    # The kernels leave room for as many entries as reads, because the host does not know better until here.
    num_entries = sum(sizes)
    return Route(
        row_index=found.row_index[:num_entries],
        counts=found.counts.to(count_dtype(slot_index.shape[1])),
        sizes=sizes,
        read_order=found.read_order,
        entry_of_read=found.entry_of_read,
        offsets=None if found.offsets is None else found.offsets[: num_entries + 1],
        backend=backend,
    )


def _check_slots(slot_index: Tensor, row_cuts: Tensor, backend: Backend) -> None:
    fits = slot_index.dim() == 2 and slot_index.dtype in (torch.int32, torch.int64)
    require(fits, "slot_index", slot_index, "two dimensions of int32 or int64")
    require(slot_index.numel() <= _MOST_READS, "slot_index", slot_index, f"at most {_MOST_READS} reads")
    most = torch.iinfo(torch.int16).max
    require(slot_index.shape[1] <= most, "slot_index", slot_index, f"at most {most} reads a token")
    fits = row_cuts.dim() == 1 and row_cuts.numel() > 1 and row_cuts.dtype == torch.int64
    require(fits, "row_cuts", row_cuts, "one dimension of at least two int64 boundaries")
    require(row_cuts.device == slot_index.device, "row_cuts", row_cuts, f"its place on {slot_index.device}")
    if backend.check_indices:
        cuts = row_cuts.tolist()
        if cuts[0] != 0 or cuts != sorted(cuts):
            raise IndexError(f"row_cuts are {cuts}; they must ascend from 0.")
        check_range("slot_index", slot_index, cuts[-1], backend)


def pack_columns(numbers: Tensor, column_cuts: Sequence[int], copies: int, *, backend: Backend) -> Tensor:
    """Lay the column slices of `[T, D]` one after the other, each as often as it is sent.

    Args:
        numbers: `[T, D]`, of any strides.
        column_cuts: W + 1 boundaries, from 0 to D.
        copies: R, of every slice.
        backend: what moves them.

    Returns:
        `[R*T*D]`: for each slice R times `[T, D_j]`.

    Raises:
        ValueError: shapes or cuts do not fit.
    """
    require(numbers.dim() == 2, "numbers", numbers, "two dimensions")
    _check_cuts(column_cuts, "numbers", numbers, numbers.shape[1])
    if len(column_cuts) == 2 and copies == 1:
        return numbers.reshape(-1)
    if backend.is_triton:
        from mempar.kernels.segment_route import fused

        return fused.pack_columns(numbers, column_cuts, copies)
    return native.pack_columns(numbers, column_cuts, copies)


def unpack_columns(
    pieces: Tensor, column_cuts: Sequence[int], num_tokens: int, parts: int, *, backend: Backend
) -> Tensor:
    """Put `[T, D]` together from column slices, each the sum of some parts.

    Args:
        pieces: `[R*T*D]`, as `pack_columns` lays them: for each slice R parts `[T, D_j]`.
        column_cuts: W + 1 boundaries, from 0 to D.
        num_tokens: T.
        parts: R, of every slice; they are added first to last, in float32 at least, and rounded once.
        backend: what adds them.

    Returns:
        `[T, D]`.

    Raises:
        ValueError: shapes or cuts do not fit.
    """
    width = column_cuts[-1]
    _check_cuts(column_cuts, "pieces", pieces, width)
    fits = pieces.is_contiguous() and pieces.numel() == parts * num_tokens * width and pieces.is_floating_point()
    require(fits, "pieces", pieces, f"{parts} parts of {num_tokens} x {width} numbers of a floating dtype, contiguous")
    if len(column_cuts) == 2 and parts == 1:
        return pieces.view(num_tokens, width)
    if backend.is_triton:
        from mempar.kernels.segment_route import fused

        return fused.unpack_columns(pieces, column_cuts, num_tokens, parts)
    return native.unpack_columns(pieces, column_cuts, num_tokens, parts)


def _check_cuts(column_cuts: Sequence[int], name: str, tensor: Tensor, width: int) -> None:
    ascending = all(start <= end for start, end in itertools.pairwise(column_cuts))
    fits = len(column_cuts) > 1 and column_cuts[0] == 0 and column_cuts[-1] == width and ascending
    require(fits, name, tensor, f"as many columns as the cuts {list(column_cuts)}, which ascend from 0")
