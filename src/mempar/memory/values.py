"""One shard of the value table, and the gradient records that backward passes leave in it.

The table is neither a Parameter nor a buffer: megatron would cast it, broadcast one rank's shard
over the others and allocate a dense float32 gradient. Backward deposits records (row, weight, bag,
output gradient); after the last micro-batch they are reduced by row. Several layers may read the
same shard, and it must not change before all of them are differentiated, so nothing is updated here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather
from mempar.memory.initial import table_values


@dataclass(frozen=True)
class _Record:
    row_index: Tensor  # [E] int32
    weight: Tensor  # [E]
    bag_index: Tensor  # [E] int32, rows of grad
    grad: Tensor  # [B, D_j]


class ValueShard:
    """Rows and columns of one table, held by this rank.

    Attributes:
        values: `[S_i, D_j]`, the numbers that lookups read.
        part: which rows and columns they are.
    """

    def __init__(
        self, part: TableSlice, *, seed: int, number: int = 0, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the initial values of a shard of table `number`, which do not depend on how it is cut."""
        self.part = part
        self.values = table_values(part, seed=seed, number=number, dtype=dtype, device=device)
        self._records: list[_Record] = []

    def gather(self, row_index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sums `[B, D_j]` of this shard's rows; see `weighted_gather`."""
        return weighted_gather(self.values, row_index, weight, offsets)

    def backward(self, row_index: Tensor, weight: Tensor, offsets: Tensor, grad: Tensor) -> Tensor:
        """Deposit the rows' gradient and return the weights'.

        Args:
            row_index: `[E] int32`, as given to `gather`.
            weight: `[E]`, as given to `gather`.
            offsets: `[B + 1] int32`, as given to `gather`.
            grad: `[B, D_j]`, gradient of `gather`'s result.

        Returns:
            `[E]` partial gradient of the weights, from this shard's columns.
        """
        grad = grad.contiguous()
        self._records.append(_Record(row_index, weight, bag_of_entries(offsets), grad))
        return gather_scores(self.values, row_index, offsets, grad)

    def dot(self, row_index: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Multiply rows with the vector of their bag.

        Args:
            row_index: `[E] int32`, rows of this shard, entries of a bag together.
            offsets: `[B + 1] int32`.
            x: `[B, D_j]`, these columns of the bags' vectors.

        Returns:
            `[E]` partial products, from this shard's columns.
        """
        return gather_scores(self.values, row_index, offsets, x)

    def dot_backward(self, row_index: Tensor, grad: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Deposit the rows' gradient of `dot` and return the vectors'.

        Args:
            row_index: as given to `dot`.
            grad: `[E]`, gradient of the products.
            offsets: as given to `dot`.
            x: as given to `dot`.

        Returns:
            `[B, D_j]` partial gradient of `x`, from this shard's rows.
        """
        self._records.append(_Record(row_index, grad, bag_of_entries(offsets), x))
        return weighted_gather(self.values, row_index, grad, offsets)

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """Reduce all records by row and forget them.

        Returns:
            `rows [U] int32`, ascending, and their gradients `[U, D_j]`, in float32 at least; empty when
            nothing was read.
        """
        records, self._records = self._records, []
        wide = torch.promote_types(self.values.dtype, torch.float32)
        if not records:
            none = torch.zeros(0, dtype=torch.int32, device=self.values.device)
            return none, self.values.new_zeros(0, self.part.num_columns, dtype=wide)
        first_bag = 0
        bags = []
        for record in records:
            bags.append(record.bag_index + first_bag)
            first_bag += len(record.grad)
        return reduce_rows(
            torch.cat([record.row_index for record in records]),
            torch.cat([record.weight for record in records]).to(wide),
            torch.cat(bags),
            torch.cat([record.grad for record in records]).to(wide),
        )

    @property
    def record_bytes(self) -> int:
        """Bytes held by records that were not yet reduced."""
        return sum(
            tensor.numel() * tensor.element_size()
            for record in self._records
            for tensor in (record.row_index, record.weight, record.bag_index, record.grad)
        )
