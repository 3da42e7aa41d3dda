"""One shard of the value table, and the gradient records that backward passes leave in it.

The table is neither a Parameter nor a buffer: megatron would cast it, broadcast one rank's shard
over the others and allocate a dense float32 gradient. Backward deposits records (row, weight, bag,
output gradient); after the last micro-batch they are reduced by row. Several layers may read the
same shard, and it must not change before all of them are differentiated, so nothing is updated here.

A record keeps the output gradient of its tokens: D_j numbers a token and about 12 bytes an entry. Over
many micro-batches that outgrows what is left once records of the same row are summed, D_j float32
numbers for each touched row, at most the shard's; `deposit_bytes` bounds it. Summing early pays where
tokens of a step outnumber the rows that they touch.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.reduce_rows import reduce_row_parts
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather
from mempar.marks import Marks
from mempar.memory.initial import table_values


@dataclass(frozen=True)
class _Record:
    row_index: Tensor  # [E] int32
    weight: Tensor  # [E]
    bag_index: Tensor  # [E] int32, rows of grad
    grad: Tensor  # [B, D_j]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in (self.row_index, self.weight, self.bag_index, self.grad))


class ValueShard:
    """Rows and columns of one table, held by this rank.

    Attributes:
        values: `[S_i, D_j]`, the numbers that lookups read.
        part: which rows and columns they are.
        reads: rows of the entries that were differentiated, `[E] int32` each; None unless somebody collects them.
    """

    def __init__(
        self,
        part: TableSlice,
        *,
        seed: int | None,
        number: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        deposit_bytes: int = 0,
        backend: Backend = TORCH,
        marks: Marks | None = None,
    ) -> None:
        """Make the initial values of a shard of table `number`, which do not depend on how it is cut.

        Args:
            part: the slice to hold.
            seed: of the values; None for a table that is read from somewhere: they are left as they come.
            number: of the table in its model.
            dtype: of the values.
            device: where they lie.
            deposit_bytes: records beyond this are summed by row; 0 keeps all until the end of the step.
            backend: what computes reads and sums.
            marks: take the time of it.
        """
        self.part = part
        if seed is None:
            self.values = torch.empty(part.num_rows, part.num_columns, dtype=dtype, device=device)
        else:
            self.values = table_values(part, seed=seed, number=number, dtype=dtype, device=device)
        self.deposit_bytes = deposit_bytes
        self.backend = backend
        self.marks = marks or Marks()
        self.reads: list[Tensor] | None = None
        self._records: list[_Record] = []
        # Records that were summed early, as one record of weight 1 for each row; it stays first.
        self._summed: _Record | None = None

    def gather(self, row_index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sums `[B, D_j]` of this shard's rows; see `weighted_gather`."""
        with self.marks.span("gather"):
            return weighted_gather(self.values, row_index, weight, offsets, backend=self.backend)

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
        with self.marks.span("gather_backward"):
            grad, bag_index = grad.contiguous(), bag_of_entries(offsets, len(row_index))
            score_grad = gather_scores(self.values, row_index, bag_index, grad, backend=self.backend)
        self.deposit(row_index, weight, bag_index, grad)
        return score_grad

    def dot(self, row_index: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Multiply rows with the vector of their bag.

        Args:
            row_index: `[E] int32`, rows of this shard, entries of a bag together.
            offsets: `[B + 1] int32`.
            x: `[B, D_j]`, these columns of the bags' vectors.

        Returns:
            `[E]` partial products, from this shard's columns.
        """
        with self.marks.span("gather"):
            bag_index = bag_of_entries(offsets, len(row_index))
            return gather_scores(self.values, row_index, bag_index, x, backend=self.backend)

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
        with self.marks.span("gather_backward"):
            bag_index = bag_of_entries(offsets, len(row_index))
            x_grad = weighted_gather(self.values, row_index, grad, offsets, backend=self.backend)
        self.deposit(row_index, grad, bag_index, x)
        return x_grad

    def deposit(self, row_index: Tensor, weight: Tensor, bag_index: Tensor, grad: Tensor) -> None:
        """Keep a gradient of rows, `weight[e] * grad[bag_index[e]]` of row `row_index[e]`, until it is taken.

        Args:
            row_index: `[E] int32`.
            weight: `[E]`.
            bag_index: `[E] int32`, rows of `grad`.
            grad: `[B, D_j]`.
        """
        self._records.append(_Record(row_index, weight, bag_index, grad))
        if self.reads is not None:
            self.reads.append(row_index)
        if self.deposit_bytes and sum(each.num_bytes for each in self._records) > self.deposit_bytes:
            self._sum_early()

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """Reduce all records by row and forget them.

        Returns:
            `rows [U] int32`, ascending, and their gradients `[U, D_j]`, in float32 at least; empty when
            nothing was read.
        """
        records = self._all_records()
        self._records, self._summed = [], None
        wide = torch.promote_types(self.values.dtype, torch.float32)
        if not records:
            none = torch.zeros(0, dtype=torch.int32, device=self.values.device)
            return none, self.values.new_zeros(0, self.part.num_columns, dtype=wide)
        first_bags = itertools.accumulate((len(record.grad) for record in records), initial=0)
        with self.marks.span("reduce_rows"):
            return reduce_row_parts(
                torch.cat([record.row_index for record in records]),
                torch.cat([record.weight.to(wide) for record in records]),
                torch.cat([record.bag_index + first for record, first in zip(records, first_bags, strict=False)]),
                [record.grad for record in records],
                backend=self.backend,
            )

    def _sum_early(self) -> None:
        """Replace all records by one for each row; when that happens depends on the records' sizes alone."""
        rows, grad = self.take_gradient()
        each = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self._summed = _Record(rows, torch.ones_like(each, dtype=grad.dtype), each, grad)

    def _all_records(self) -> list[_Record]:
        return [*([] if self._summed is None else [self._summed]), *self._records]

    @property
    def record_bytes(self) -> int:
        """Bytes held by what was deposited and not yet taken."""
        return sum(record.num_bytes for record in self._all_records())
