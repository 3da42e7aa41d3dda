"""Routes, packing and unpacking of torch's own operators: what runs on CPUs."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Buckets(NamedTuple):
    """Entries by owner, as in `Route`; `row_index` and `offsets` may be longer than there are entries.

    Attributes:
        row_index: `[T*M or less] int32`.
        counts: `[R, T] int32`.
        read_order: `[T*M] int32`.
        entry_of_read: `[T*M] int32`.
        offsets: `[T*M + 1 or less] int32`; None when entries are reads.
    """

    row_index: Tensor
    counts: Tensor
    read_order: Tensor
    entry_of_read: Tensor
    offsets: Tensor | None


def bucket(slot_index: Tensor, row_cuts: Tensor, merge: bool) -> Buckets:
    """Bucket `[T, M]` reads by owner; see `route`."""
    num_tokens, reads = slot_index.shape
    num_shards, device = row_cuts.numel() - 1, slot_index.device
    slots = slot_index.reshape(-1).long()
    owner = torch.bucketize(slots, row_cuts[1:-1], right=True)
    token = torch.arange(num_tokens, device=device).repeat_interleave(reads)
    # [T*M]: reads of one owner and token
    segment = owner * num_tokens + token
    offsets = None
    if merge:
        # One flat sort is half the time of a sort a token; it is stable, so that sums of weights do not vary.
        ascending, read_order = torch.sort(segment * row_cuts[-1] + slots, stable=True)
        is_first = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=is_first[1:])
        first = is_first.nonzero()[:, 0]
        entry, first_read = is_first.cumsum(0) - 1, read_order[first]
        offsets = torch.cat([first, first.new_full((1,), len(slots))]).int()
    else:
        # Few owners sort faster in fewer bits.
        read_order = torch.sort(owner.short() if num_shards < 2**15 else owner, stable=True)[1]
        entry, first_read = torch.arange(len(slots), device=device), read_order
    counts = torch.zeros(num_shards * num_tokens, dtype=torch.int32, device=device)
    counts.scatter_add_(0, segment[first_read], torch.ones_like(first_read, dtype=torch.int32))
    entry_of_read = torch.empty_like(entry, dtype=torch.int32)
    entry_of_read[read_order] = entry.int()
    return Buckets(
        row_index=(slots - row_cuts[owner])[first_read].int(),
        counts=counts.view(num_shards, num_tokens),
        read_order=read_order.int(),
        entry_of_read=entry_of_read,
        offsets=offsets,
    )


def add_reads(per_read: Tensor, read_order: Tensor, offsets: Tensor) -> Tensor:
    """Sum `[T*M]` numbers entry by entry, in the order of the reads: `[E]`."""
    if not len(per_read):
        return per_read
    column = per_read.to(torch.promote_types(per_read.dtype, torch.float32))[:, None]
    sums = F.embedding_bag(read_order, column, offsets, mode="sum", include_last_offset=True)
    return sums[:, 0].to(per_read.dtype)


def spread_entries(parts: Tensor, entry_of_read: Tensor | None) -> Tensor:
    """Sum `[N, E]` over the parts and give every read its entry's number: `[T*M]`."""
    total = _sum_in_order(parts)
    return total if entry_of_read is None else total.index_select(0, entry_of_read)


def pack_columns(numbers: Tensor, column_cuts: Sequence[int], copies: int) -> Tensor:
    """Lay column slices one after the other; see the public operation."""
    slices = [numbers[:, start:end].reshape(-1) for start, end in itertools.pairwise(column_cuts)]
    return torch.cat([each for each in slices for _ in range(copies)])


def unpack_columns(pieces: Tensor, column_cuts: Sequence[int], num_tokens: int, parts: int) -> Tensor:
    """Put columns together from summed parts; see the public operation."""
    widths = [end - start for start, end in itertools.pairwise(column_cuts)]
    slices = pieces.split([parts * num_tokens * width for width in widths])
    out = pieces.new_empty(num_tokens, column_cuts[-1])
    for place, piece, width in zip(out.split(widths, dim=1), slices, widths, strict=True):
        place.copy_(_sum_in_order(piece.view(parts, num_tokens, width)))
    return out


def _sum_in_order(parts: Tensor) -> Tensor:
    """Add `[N, ...]` first to last, in float32 at least, and round once."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)
