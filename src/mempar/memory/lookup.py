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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.kernels.peer import peer, peer_backward
from mempar.kernels.weighted_gather import bag_of_entries
from mempar.memory.values import ValueShard


class RowReader(Protocol):
    """Anything that turns slots and weights into sums of table rows."""

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Any:
        """Find the rows of slots, for any number of reads and products.

        Args:
            slot_index: `[T, M] int64`, slots of the whole table.
            token_counts: tokens read by each rank that takes part, where the caller knows them.

        Returns:
            What `read` and `dot` take, of this reader and of readers of other tables of the same memory.
        """
        ...

    def read(self, found: Any, weight: Tensor) -> Tensor:
        """Sum the weighted rows of every token.

        Args:
            found: the rows, from `find`.
            weight: `[T, M]`; differentiable.

        Returns:
            `[T, D]` in the table's dtype.
        """
        ...

    def dot(self, found: Any, x: Tensor) -> Tensor:
        """Multiply chosen rows with a vector of their token.

        Args:
            found: the rows, from `find`.
            x: `[T, D]`; differentiable.

        Returns:
            `[T, M]` in the table's dtype: `values[slot_index[t, m]] . x[t]`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The tables that a memory layer reads, all cut alike.

    Attributes:
        values: rows that are summed.
        down: rows that the input is multiplied with; None unless slots are experts (`peer`).
    """

    values: RowReader
    down: RowReader | None = None

    def read_experts(self, found: Any, weight: Tensor, x: Tensor) -> Tensor:
        """Sum what the chosen experts say: `weight[t, m] * gelu(down[slot] . x[t]) * values[slot]`.

        Where both tables lie here whole that is one operation. Elsewhere it is two, because the products are sums over
        the ranks that hold the columns: they have to be exchanged before they are activated.

        Args:
            found: the rows, from `find` of one of the readers.
            weight: `[T, M]`; differentiable.
            x: `[T, D]`; differentiable.

        Returns:
            `[T, D]` in the tables' dtype.
        """
        assert self.down is not None
        match self.down, self.values:
            case LocalReader(shard=down), LocalReader(shard=values):
                dtype = values.values.dtype
                weight = weight.to(torch.promote_types(dtype, torch.float32))
                return _LocalExperts.apply(weight, x.to(dtype), found, down, values)
        hidden = self.down.dot(found, x)
        return self.values.read(found, weight * F.gelu(hidden.to(weight.dtype)))


@dataclass(frozen=True, kw_only=True)
class LocalRows:
    """Rows of tables that lie here whole.

    Attributes:
        row_index: `[T * M] int32`.
        offsets: `[T + 1] int32`, where each token's rows start.
        shape: `[T, M]`.
    """

    row_index: Tensor
    offsets: Tensor
    shape: torch.Size


class LocalReader:
    """Reads a table that lies in one piece in this process."""

    def __init__(self, shard: ValueShard) -> None:
        self.shard = shard

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> LocalRows:
        """See `RowReader.find`."""
        num_tokens, reads = slot_index.shape
        offsets = torch.arange(0, num_tokens * reads + 1, reads, dtype=torch.int32, device=slot_index.device)
        return LocalRows(row_index=slot_index.reshape(-1).int(), offsets=offsets, shape=slot_index.shape)

    def read(self, found: LocalRows, weight: Tensor) -> Tensor:
        """See `RowReader.read`."""
        return _LocalRead.apply(weight.to(self.shard.values.dtype), found, self.shard)

    def dot(self, found: LocalRows, x: Tensor) -> Tensor:
        """See `RowReader.dot`."""
        return _LocalDot.apply(x.to(self.shard.values.dtype), found, self.shard)


class SilentReader:
    """Reads nothing: the model with its memory switched off, for comparison."""

    def __init__(self, value_dim: int) -> None:
        self.value_dim = value_dim

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> torch.Size:
        """Look for nothing: only `[T, M]` matters."""
        return slot_index.shape

    def read(self, found: torch.Size, weight: Tensor) -> Tensor:
        """Return zeros `[T, D]`."""
        return weight.new_zeros(found[0], self.value_dim)

    def dot(self, found: torch.Size, x: Tensor) -> Tensor:
        """Return zeros `[T, M]`."""
        return x.new_zeros(found)


class _LocalRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, found: LocalRows, shard: ValueShard) -> Tensor:
        flat_weight = weight.detach().reshape(-1)
        ctx.save_for_backward(flat_weight)
        ctx.shard, ctx.found = shard, found
        return shard.gather(found.row_index, flat_weight, found.offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        score_grad = ctx.shard.backward(ctx.found.row_index, weight, ctx.found.offsets, grad)
        return score_grad.view(ctx.found.shape), None, None


class _LocalDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: LocalRows, shard: ValueShard) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x)
        ctx.shard, ctx.found = shard, found
        return shard.dot(found.row_index, found.offsets, x).view(found.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.shard.dot_backward(ctx.found.row_index, grad.reshape(-1), ctx.found.offsets, x), None, None


class _LocalExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, found: LocalRows, down: ValueShard, values: ValueShard) -> Tensor:
        weight, x = weight.detach().reshape(-1), x.detach().contiguous()
        row_index, offsets, backend = found.row_index, found.offsets, values.backend
        with values.marks.span("gather"):
            out, hidden = peer(down.values, values.values, row_index, weight, offsets, x, backend=backend)
        ctx.save_for_backward(weight, x, hidden)
        ctx.found, ctx.down, ctx.values = found, down, values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, x, hidden = ctx.saved_tensors
        found, down, values, grad = ctx.found, ctx.down, ctx.values, grad.contiguous()
        tables = (down.values, values.values)
        reads = (found.row_index, weight, found.offsets, hidden, grad)
        with values.marks.span("gather_backward"):
            grads = peer_backward(*tables, *reads, backend=values.backend)
            bag_index = bag_of_entries(found.offsets, len(found.row_index))
        values.deposit(found.row_index, grads.value_weight, bag_index, grad)
        down.deposit(found.row_index, grads.down_weight, bag_index, x)
        return grads.weight.view(found.shape), grads.x, None, None, None
