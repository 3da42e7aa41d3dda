"""Sorting entries by the row shard that owns them.

An entry is one read of a slot, with a number of its own (its weight). Entries are bucketed by owner, keeping the order
of tokens inside a bucket, so that the owner can sum token by token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutedEntries:
    """This rank's entries, bucketed by row shard.

    Attributes:
        row_index: `[E] int32`, row within the owner's shard.
        order: `[E] int64`, position before bucketing; None when nothing was moved.
        counts: `[R, T]`, entries of each token owned by each row shard, in the smallest dtype that
            holds M; None when one shard owns all rows.
        sizes: entries owned by each row shard.
    """

    row_index: Tensor
    order: Tensor | None
    counts: Tensor | None
    sizes: list[int]

    def sort(self, values: Tensor) -> Tensor:
        """Bring `[E]` numbers, one an entry in token order, into bucket order."""
        return values if self.order is None else values[self.order]

    def unsort(self, values: Tensor) -> Tensor:
        """Put `[E]` numbers, one an entry in bucket order, back into token order."""
        if self.order is None:
            return values
        restored = torch.empty_like(values)
        restored[self.order] = values
        return restored


def count_dtype(reads: int) -> torch.dtype:
    """The dtype of per-token counts up to M reads: one byte where M allows it, else two."""
    return torch.uint8 if reads <= 255 else torch.int16


def route(slot_index: Tensor, row_cuts: list[int]) -> RoutedEntries:
    """Bucket the entries of some tokens by owner.

    Args:
        slot_index: `[T, M] int64`.
        row_cuts: R + 1 boundaries of the row shards.

    Returns:
        The entries in owner order. With several row shards the host waits for their counts.
    """
    num_tokens, reads = slot_index.shape
    if len(row_cuts) == 2:
        return RoutedEntries(
            row_index=slot_index.reshape(-1).int(),
            order=None,
            counts=None,
            sizes=[slot_index.numel()],
        )
    num_shards = len(row_cuts) - 1
    cuts = torch.tensor(row_cuts, device=slot_index.device)
    owner = torch.bucketize(slot_index, cuts[1:-1], right=True)
    counts = torch.zeros(num_tokens, num_shards, dtype=torch.int32, device=slot_index.device)
    counts.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.int32))
    order = torch.sort(owner.reshape(-1), stable=True)[1]
    row_index = (slot_index - cuts[owner]).reshape(-1)
    return RoutedEntries(
        row_index=row_index[order].int(),
        order=order,
        counts=counts.t().contiguous().to(count_dtype(reads)),
        sizes=counts.sum(0).tolist(),
    )
