"""Adam on a shard: exact dense AdamW, or the touched rows only. The package's docstring has the formulas."""

import math

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.memory.optimizer.table import OptimizerSettings, TableOptimizer


class TableAdam(TableOptimizer):
    """Moments of one shard and their update.

    Attributes:
        state: `exp_avg` and `exp_avg_sq` `[S_i, D_j]`, in float32 at least or in bf16, and `master` where bf16
            values keep float32 ones beside them.
    """

    def __init__(self, values: Tensor, part: TableSlice, settings: OptimizerSettings, *, touched_only: bool) -> None:
        super().__init__(values, part, settings)
        self.touched_only = touched_only
        dtype = torch.bfloat16 if settings.moments == "bf16" else self.wide
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[name] = torch.zeros_like(values, dtype=dtype)

    def _update(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        if self.touched_only:
            self._update_touched(rows, grad, lr)
        else:
            self._update_all(rows, grad, lr)

    def _adam(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float) -> None:
        settings = self.settings
        correction1 = 1.0 - settings.beta1**self.step
        correction2 = math.sqrt(1.0 - settings.beta2**self.step)
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(settings.eps)
        self._decay(weight, lr)
        weight.addcdiv_(exp_avg, denominator, value=-lr / correction1)

    def _update_touched(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        for block in self._blocks(len(rows)):
            index, part = rows[block], grad[block]
            exp_avg = self.state["exp_avg"].index_select(0, index).to(self.wide)
            exp_avg_sq = self.state["exp_avg_sq"].index_select(0, index).to(self.wide)
            exp_avg.lerp_(part, 1.0 - self.settings.beta1)
            exp_avg_sq.mul_(self.settings.beta2).addcmul_(part, part, value=1.0 - self.settings.beta2)
            weight = self._read(index)
            self._adam(weight, exp_avg, exp_avg_sq, lr)
            self._write(index, weight)
            for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
                if self.state[name].dtype != self.wide:
                    moment = self.rounder.stochastic(moment, index, self.step, name)
                self.state[name].index_copy_(0, index, moment)

    def _update_all(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        blocks = list(self._blocks(len(self.values)))
        ends = torch.tensor([0, *(block.stop for block in blocks)], device=rows.device)
        bounds = torch.searchsorted(rows, ends).tolist()
        for block, first, last in zip(blocks, bounds, bounds[1:], strict=False):
            exp_avg, exp_avg_sq = self.state["exp_avg"][block], self.state["exp_avg_sq"][block]
            touched, part = rows[first:last] - block.start, grad[first:last]
            exp_avg.mul_(self.settings.beta1).index_add_(0, touched, part, alpha=1.0 - self.settings.beta1)
            exp_avg_sq.mul_(self.settings.beta2).index_add_(0, touched, part * part, alpha=1.0 - self.settings.beta2)
            weight = self._read(block)
            self._adam(weight, exp_avg, exp_avg_sq, lr)
            self._write(block, weight)
