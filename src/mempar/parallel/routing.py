"""Sorting entries by the row shard that owns them.

An entry is one weighted row of one token: a read, or several that chose the same slot (merging.py).
Entries are bucketed by owner, keeping the order of tokens inside a bucket, so that the owner can sum
token by token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend
from mempar.parallel.merging import MergedReads, merge_reads


@dataclass(frozen=True, kw_only=True)
class RoutedEntries:
    """This rank's entries, bucketed by row shard.

    Attributes:
        row_index: `[E] int32`, row within the owner's shard.
        order: `[E] int64`, position before bucketing; None when nothing was moved.
        counts: `[R, T]`, entries of each token owned by each row shard, in the smallest dtype that
            holds M; None when every token has M entries with one owner.
        sizes: entries owned by each row shard.
        merged: which reads share an entry; None when every read is one.
    """

    row_index: Tensor
    order: Tensor | None
    counts: Tensor | None
    sizes: list[int]
    merged: MergedReads | None

    def to_entries(self, per_read: Tensor) -> Tensor:
        """Turn `[T, M]` numbers into `[E]` in bucket order, adding those of reads that share an entry."""
        values = per_read.reshape(-1)
        if self.merged is not None:
            values = self.merged.add(values)
        return values if self.order is None else values[self.order]

    def to_reads(self, per_entry: Tensor) -> Tensor:
        """Give every read the number of its entry: `[E]` in bucket order to `[T*M]`."""
        values = per_entry
        if self.order is not None:
            values = torch.empty_like(per_entry)
            values[self.order] = per_entry
        return values if self.merged is None else self.merged.spread(values)


def count_dtype(reads: int) -> torch.dtype:
    """The dtype of per-token counts up to M reads: one byte where M allows it, else two."""
    return torch.uint8 if reads <= 255 else torch.int16


def route(slot_index: Tensor, row_cuts: list[int], *, merge: bool = False, backend: Backend) -> RoutedEntries:
    """Bucket the entries of some tokens by owner.

    Args:
        slot_index: `[T, M] int64`.
        row_cuts: R + 1 boundaries of the row shards.
        merge: whether reads of a token that chose the same slot become one entry.
        backend: what computes it.

    Returns:
        The entries in owner order. With several row shards, or merging, the host waits for their counts.
    """
    num_tokens, reads = slot_index.shape
    num_shards, device = len(row_cuts) - 1, slot_index.device
    merged = merge_reads(slot_index, row_cuts[-1], backend=backend) if merge else None
    slots = slot_index.reshape(-1) if merged is None else merged.slot_index
    if num_shards == 1 and merged is None:
        return RoutedEntries(row_index=slots.int(), order=None, counts=None, sizes=[len(slots)], merged=None)
    if merged is None:
        token_index = torch.arange(num_tokens, device=device).repeat_interleave(reads)
    else:
        token_index = merged.token_index
    cuts = torch.tensor(row_cuts, device=device)
    owner = torch.bucketize(slots, cuts[1:-1], right=True)
    counts = torch.zeros(num_shards * num_tokens, dtype=torch.int32, device=device)
    counts.scatter_add_(0, owner * num_tokens + token_index, torch.ones_like(owner, dtype=torch.int32))
    counts = counts.view(num_shards, num_tokens)
    row_index = (slots - cuts[owner]).int()
    order = None
    if num_shards > 1:
        order = torch.sort(owner, stable=True)[1]
        row_index = row_index[order]
    return RoutedEntries(
        row_index=row_index,
        order=order,
        counts=counts.to(count_dtype(reads)),
        sizes=counts.sum(1).tolist(),
        merged=merged,
    )
