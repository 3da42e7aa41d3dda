"""Merging the reads of a token that chose the same slot: the row is asked for once.

The heads of one token may choose the same slot. Their weights are added, one entry travels, the owner
reads and deposits one row, and the one gradient that comes back is that of every read. Nothing merges
across tokens, because an owner returns sums token by token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import weighted_gather


@dataclass(frozen=True, kw_only=True)
class MergedReads:
    """Which reads of `[T, M]` became which entry.

    Attributes:
        slot_index: `[E] int64`, distinct within a token, token by token, ascending.
        token_index: `[E] int64`.
        entry_of_read: `[T*M] int64`.
        read_order: `[T*M] int64`, reads sorted by entry, in their own order within one.
        offsets: `[E + 1] int64`, where each entry's reads start in `read_order`.
        backend: what adds.
    """

    slot_index: Tensor
    token_index: Tensor
    entry_of_read: Tensor
    read_order: Tensor
    offsets: Tensor
    backend: Backend

    def add(self, per_read: Tensor) -> Tensor:
        """Sum `[T*M]` numbers entry by entry, in the order of the reads: `[E]`."""
        column, ones = per_read[:, None].contiguous(), torch.ones_like(per_read)
        return weighted_gather(column, self.read_order, ones, self.offsets, backend=self.backend)[:, 0]

    def spread(self, per_entry: Tensor) -> Tensor:
        """Give every read its entry's number: `[E]` to `[T*M]`."""
        return per_entry[self.entry_of_read]


def merge_reads(slot_index: Tensor, num_slots: int, *, backend: Backend) -> MergedReads:
    """Find the reads of each token that chose the same slot; the host waits for their number.

    Args:
        slot_index: `[T, M] int64`.
        num_slots: S.
        backend: what computes it.
    """
    num_tokens, reads = slot_index.shape
    token = torch.arange(num_tokens, device=slot_index.device)
    # One flat sort is half the time of a sort a token; it is stable, so that sums of weights do not vary.
    ascending, read_order = torch.sort((slot_index + token[:, None] * num_slots).view(-1), stable=True)
    is_first = torch.ones_like(ascending, dtype=torch.bool)
    torch.ne(ascending[1:], ascending[:-1], out=is_first[1:])
    entry_of_read = torch.empty_like(read_order)
    entry_of_read[read_order] = is_first.cumsum(0) - 1
    first = is_first.nonzero()[:, 0]
    return MergedReads(
        slot_index=slot_index.reshape(-1)[read_order[first]],
        token_index=first // reads,
        entry_of_read=entry_of_read,
        read_order=read_order,
        offsets=torch.cat([first, first.new_full((1,), slot_index.numel())]),
        backend=backend,
    )
