"""Reading weighted rows of a table: what a memory layer asks for, and the answer of one process.

`RowReader` is the protocol between the two blind rooms: memory layers call it, and
`mempar.parallel.exchange.ShardedReader` answers it across ranks; `LocalReader` answers it from one
shard that holds the whole table. Reading is differentiable in the weights; the gradient of the rows
never exists as a tensor of the table's shape, it is deposited as records (see values.py).
"""

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


class LocalReader:
    """Reads a table that lies in one piece in this process."""

    def __init__(self, shard: ValueShard) -> None:
        self.shard = shard

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """See `RowReader.read`."""
        return _LocalRead.apply(weight.to(self.shard.values.dtype), slot_index, self.shard)


class SilentReader:
    """Reads nothing: the model with its memory switched off, for comparison."""

    def __init__(self, value_dim: int) -> None:
        self.value_dim = value_dim

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Return zeros `[T, D]`."""
        return weight.new_zeros(weight.shape[0], self.value_dim)


class _LocalRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, slot_index: Tensor, shard: ValueShard) -> Tensor:
        num_tokens, reads = slot_index.shape
        row_index = slot_index.reshape(-1).int()
        offsets = torch.arange(0, num_tokens * reads + 1, reads, dtype=torch.int32, device=weight.device)
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
