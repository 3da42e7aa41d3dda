"""What all optimizers of a shard share: settings, state, and rows in the precision of arithmetic."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.row_update import TableRows


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What does not change during a run.

    Attributes:
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: added to the root of the second statistic.
        weight_decay: decoupled decay.
        moments: `float32` (at least: the dtype of arithmetic) or `bf16`, of row_adam's moments.
        rounding: how bf16 values are kept; see kernels/row_update/rounding.py.
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
        self.state: dict[str, Tensor] = {}
        if values.dtype != self.wide and settings.rounding == "master":
            self.state["master"] = values.to(self.wide)

    @property
    def rows(self) -> TableRows:
        """The values as updates see them."""
        return TableRows(
            values=self.values,
            part=self.part,
            master=self.state.get("master"),
            stochastic=self.settings.rounding == "stochastic",
            seed=self.settings.seed,
        )

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
        self._update(rows, grad, lr)

    @abstractmethod
    def _update(self, rows: Tensor, grad: Tensor, lr: float) -> None: ...
