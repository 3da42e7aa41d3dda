"""What all optimizers of a shard share: settings, state, and rows in the precision of arithmetic."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.row_update.rounding import Rounder

# Elements updated at a time, which bounds the temporaries.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What does not change during a run.

    Attributes:
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: added to the root of the second statistic.
        weight_decay: decoupled decay.
        moments: `float32` (at least: the dtype of arithmetic) or `bf16`, of row_adam's moments.
        rounding: how bf16 values are kept; see rounding.py.
        column_tile: columns that share one statistic of row_adagrad; column shards start on a tile.
        seed: of stochastic rounding.
        backend: what computes updates.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    moments: str = "float32"
    rounding: str = "master"
    column_tile: int = 128
    seed: int = 0
    backend: Backend = TORCH


class TableOptimizer(ABC):
    """State of one shard and its update.

    Attributes:
        step: updates applied so far.
        state: tensors that are saved with the values, by name; each has a row for each row of the shard.
    """

    def __init__(self, values: Tensor, part: TableSlice, settings: OptimizerSettings) -> None:
        self.values = values
        self.part = part
        self.settings = settings
        self.step = 0
        self.wide = torch.promote_types(values.dtype, torch.float32)
        self.rounder = Rounder(part, settings.seed)
        self.state: dict[str, Tensor] = {}
        if values.dtype != self.wide and settings.rounding == "master":
            self.state["master"] = values.to(self.wide)

    def place_of(self, name: str) -> TableSlice:
        """Where a state tensor lies in the logical tensor that all shards make up."""
        return self.part

    def update(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        """Apply one step.

        Args:
            rows: `[U] int32`, distinct, ascending.
            grad: `[U, D_j]`, already scaled and clipped.
            lr: learning rate of this step.
        """
        self.step += 1
        self._update(rows.long(), grad.to(self.wide), lr)

    @abstractmethod
    def _update(self, rows: Tensor, grad: Tensor, lr: float) -> None: ...

    def _blocks(self, count: int) -> Iterator[slice]:
        """Ranges of at most so many rows that temporaries stay bounded."""
        at_once = max(1, CHUNK_ELEMENTS // max(1, self.values.shape[1]))
        for start in range(0, count, at_once):
            yield slice(start, min(start + at_once, count))

    def _decay(self, weight: Tensor, lr: float) -> None:
        weight.mul_(1.0 - lr * self.settings.weight_decay)

    def _read(self, index: Tensor | slice) -> Tensor:
        """Rows of the values, wide: a copy of the rows of an index, a view of a slice where there is one."""
        return _rows_of(self.state.get("master", self.values), index).to(self.wide)

    def _write(self, index: Tensor | slice, weight: Tensor) -> None:
        """Keep new values `[rows, D_j]` of the rows that `_read` gave."""
        if "master" in self.state:
            _put(self.state["master"], index, weight)
        narrow = weight
        if self.values.dtype != self.wide:
            stochastic = self.settings.rounding == "stochastic"
            narrow = (
                self.rounder.stochastic(weight, index, self.step, "values") if stochastic else weight.to(torch.bfloat16)
            )
        _put(self.values, index, narrow)


def _rows_of(tensor: Tensor, index: Tensor | slice) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def _put(target: Tensor, index: Tensor | slice, rows: Tensor) -> None:
    if not isinstance(index, slice):
        target.index_copy_(0, index, rows)
    elif target[index].data_ptr() != rows.data_ptr():
        target[index].copy_(rows)
