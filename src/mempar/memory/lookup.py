"""Reading weighted rows of a table: what a memory layer asks for, and the answer of one process.

`RowReader` is the protocol between the two blind rooms: memory layers call it, and
`mempar.parallel.exchange.ShardedReader` answers it across ranks; `LocalReader` answers it from one
shard that holds the whole table. Reading is differentiable in the weights; the gradient of the rows
never exists as a tensor of the table's shape, it is deposited as records (see values.py).

`dot` is the transpose of `read`: it multiplies chosen rows with a vector of each token instead of
summing them, and the backward pass of each computes what the other computes forward.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.memory.values import ValueShard


class RowReader(Protocol):
    """Anything that turns slots and weights into sums of table rows."""

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Sum the weighted rows of every token.

        Args:
            slot_index: `[T, M] int64`, slots of the whole table.
            weight: `[T, M]`; differentiable.
            token_counts: tokens read by each rank that takes part, where the caller knows them.

        Returns:
            `[T, D]` in the table's dtype.
        """
        ...

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Multiply chosen rows with a vector of their token.

        Args:
            slot_index: `[T, M] int64`, slots of the whole table.
            x: `[T, D]`; differentiable.
            token_counts: as in `read`.

        Returns:
            `[T, M]` in the table's dtype: `values[slot_index[t, m]] . x[t]`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The tables that a memory layer reads.

    Attributes:
        values: rows that are summed.
        down: rows that the input is multiplied with; None unless slots are experts (`peer`).
    """

    values: RowReader
    down: RowReader | None = None


class LocalReader:
    """Reads a table that lies in one piece in this process."""

    def __init__(self, shard: ValueShard) -> None:
        self.shard = shard

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """See `RowReader.read`."""
        return _LocalRead.apply(weight.to(self.shard.values.dtype), slot_index, self.shard)

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """See `RowReader.dot`."""
        return _LocalDot.apply(x.to(self.shard.values.dtype), slot_index, self.shard)


class SilentReader:
    """Reads nothing: the model with its memory switched off, for comparison."""

    def __init__(self, value_dim: int) -> None:
        self.value_dim = value_dim

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Return zeros `[T, D]`."""
        return weight.new_zeros(weight.shape[0], self.value_dim)

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Return zeros `[T, M]`."""
        return x.new_zeros(slot_index.shape)


def _flat(slot_index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[T * M] int32` and offsets `[T + 1] int32` of a table that lies here whole."""
    num_tokens, reads = slot_index.shape
    offsets = torch.arange(0, num_tokens * reads + 1, reads, dtype=torch.int32, device=slot_index.device)
    return slot_index.reshape(-1).int(), offsets


class _LocalRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, slot_index: Tensor, shard: ValueShard) -> Tensor:
        row_index, offsets = _flat(slot_index)
        flat_weight = weight.detach().reshape(-1)
        ctx.save_for_backward(row_index, flat_weight, offsets)
        ctx.shard, ctx.shape = shard, slot_index.shape
        return shard.gather(row_index, flat_weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        row_index, weight, offsets = ctx.saved_tensors
        score_grad = ctx.shard.backward(row_index, weight, offsets, grad)
        return score_grad.view(ctx.shape), None, None


class _LocalDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot_index: Tensor, shard: ValueShard) -> Tensor:
        row_index, offsets = _flat(slot_index)
        x = x.detach().contiguous()
        ctx.save_for_backward(row_index, offsets, x)
        ctx.shard = shard
        return shard.dot(row_index, offsets, x).view(slot_index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        row_index, offsets, x = ctx.saved_tensors
        return ctx.shard.dot_backward(row_index, grad.reshape(-1), offsets, x), None, None
