"""What an update of rows changes: the values of a shard, and the state of the rule that moves them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.dims import TableSlice, column_tiles
from mempar.kernels.checks import check_rows, require
from mempar.kernels.row_update.rounding import Rounder


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """Values of a shard and how narrow ones are kept.

    Attributes:
        values: `[S_i, D_j]`, in float32, float64 or bf16.
        part: where they lie in their table.
        master: `[S_i, D_j]` in the precision of arithmetic, which takes the updates of bf16 values.
        stochastic: whether bf16 values without a master are rounded stochastically, else to the nearest.
        seed: of stochastic rounding.
    """

    values: Tensor
    part: TableSlice
    master: Tensor | None = None
    stochastic: bool = False
    seed: int = 0

    @property
    def wide(self) -> torch.dtype:
        """The dtype of arithmetic."""
        return torch.promote_types(self.values.dtype, torch.float32)

    @property
    def source(self) -> Tensor:
        """`[S_i, D_j]`, the values that updates start from."""
        return self.values if self.master is None else self.master

    @property
    def rounds(self) -> bool:
        """Whether values are rounded stochastically."""
        return self.stochastic and self.master is None and self.values.dtype != self.wide

    @property
    def rounder(self) -> Rounder:
        """What rounds rows of this shard."""
        return Rounder(self.part, self.seed)

    def read(self, index: Tensor | slice) -> Tensor:
        """Rows of the values, wide: a copy of the rows of an index, a view of a slice where there is one."""
        rows = self.source[index] if isinstance(index, slice) else self.source.index_select(0, index)
        return rows.to(self.wide)

    def write(self, index: Tensor | slice, weight: Tensor, step: int) -> None:
        """Keep new values `[rows, D_j]`, wide, of the rows that `read` gave, in a step of the optimizer."""
        if self.master is not None:
            _put(self.master, index, weight)
        narrow = weight
        if self.rounds:
            narrow = self.rounder.stochastic(weight, index, step, "values")
        _put(self.values, index, narrow.to(self.values.dtype))


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """Row-wise Adagrad in one step; the package's docstring has the formula.

    Attributes:
        accumulator: `[S_i, tiles of D_j]`, in the precision of arithmetic.
        column_tile: columns that share a statistic; the shard starts on a tile.
        lr: learning rate.
        eps: added to the statistic's root.
        weight_decay: decoupled decay.
    """

    accumulator: Tensor
    column_tile: int
    lr: float
    eps: float
    weight_decay: float

    def check(self, table: TableRows) -> None:
        """Require that the state fits the table."""
        shape = (len(table.values), column_tiles(table.part, self.column_tile).num_columns)
        accumulator = self.accumulator
        fits = accumulator.shape == shape and accumulator.dtype == table.wide and accumulator.is_contiguous()
        require(fits, "accumulator", accumulator, f"shape {list(shape)} of {table.wide} without gaps")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam of touched rows in one step; the package's docstring has the formula.

    Attributes:
        exp_avg: `[S_i, D_j]`, in the precision of arithmetic or bf16, which is rounded stochastically.
        exp_avg_sq: the same.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second.
        eps: added to the second moment's root.
        weight_decay: decoupled decay.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def check(self, table: TableRows) -> None:
        """Require that the state fits the table."""
        # Numbers of float64 are not rounded stochastically.
        dtypes = (table.wide, torch.bfloat16) if table.wide == torch.float32 else (table.wide,)
        for name, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            fits = moment.shape == table.values.shape and moment.dtype in dtypes and moment.is_contiguous()
            require(fits, name, moment, f"shape {list(table.values.shape)} of one of {dtypes} without gaps")
        require(self.exp_avg.dtype == self.exp_avg_sq.dtype, "exp_avg_sq", self.exp_avg_sq, "the dtype of exp_avg")


Rule = Adagrad | Adam


def check_table(table: TableRows, rule: Rule) -> None:
    """Require that values, their master and the rule's state fit each other."""
    values, master = table.values, table.master
    check_rows("values", values)
    shape = (table.part.num_rows, table.part.num_columns)
    require(values.shape == shape, "values", values, f"the shape of its part, {list(shape)}")
    if master is not None:
        fits = master.shape == shape and master.dtype == table.wide and master.is_contiguous()
        require(fits, "master", master, f"shape {list(shape)} of {table.wide} without gaps")
    rule.check(table)


def _put(target: Tensor, index: Tensor | slice, rows: Tensor) -> None:
    if not isinstance(index, slice):
        target.index_copy_(0, index, rows)
    elif target[index].data_ptr() != rows.data_ptr():
        target[index].copy_(rows)
