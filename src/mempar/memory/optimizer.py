"""Optimizers of a table shard: exact dense AdamW, and Adam on the touched rows only.

Both take the reduced gradient of the touched rows, g [U, D_j], and never make a gradient of the
table's shape. With step number t (from 1), rates b1, b2, and learning rate lr:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- (1 - lr * decay) w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

`adamw` applies this to every row, with g = 0 where a row was not touched, exactly as
torch.optim.AdamW would on a dense gradient. `row_adam` applies it to touched rows alone: the moments
and the values of the others stay as they are, bit for bit (no decay, no momentum), and t counts all
steps. A row is touched when any token of the global batch chose it, whatever its gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements updated at a time, which bounds the temporaries.
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Coefficients that do not change during a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class TableAdam:
    """Moments of one shard and their update.

    Attributes:
        step: updates applied so far.
        state: `exp_avg` and `exp_avg_sq` `[S_i, D_j]` in float32 at least, and `master` where the
            values are narrower than float32 (a bf16 value near .03 ignores updates below 5e-5).
    """

    def __init__(self, values: Tensor, settings: AdamSettings, *, touched_only: bool) -> None:
        self.values = values
        self.settings = settings
        self.touched_only = touched_only
        self.step = 0
        self._rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
        wide = torch.promote_types(values.dtype, torch.float32)
        self.state = {
            "exp_avg": torch.zeros_like(values, dtype=wide),
            "exp_avg_sq": torch.zeros_like(values, dtype=wide),
        }
        if wide != values.dtype:
            self.state["master"] = values.to(wide)

    def update(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        """Apply one step.

        Args:
            rows: `[U] int32`, distinct, ascending.
            grad: `[U, D_j]`, already scaled and clipped.
            lr: learning rate of this step.
        """
        self.step += 1
        row_index = rows.long()
        grad = grad.to(self.state["exp_avg"].dtype)
        if self.touched_only:
            self._update_touched(row_index, grad, lr)
        else:
            self._update_all(row_index, grad, lr)

    def _adam(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float) -> None:
        settings = self.settings
        correction1 = 1.0 - settings.beta1**self.step
        correction2 = math.sqrt(1.0 - settings.beta2**self.step)
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(settings.eps)
        weight.mul_(1.0 - lr * settings.weight_decay)
        weight.addcdiv_(exp_avg, denominator, value=-lr / correction1)

    def _update_touched(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        weights = self.state.get("master", self.values)
        for first in range(0, len(rows), self._rows_at_once):
            block = slice(first, first + self._rows_at_once)
            index, part = rows[block], grad[block]
            exp_avg = self.state["exp_avg"].index_select(0, index)
            exp_avg_sq = self.state["exp_avg_sq"].index_select(0, index)
            exp_avg.lerp_(part, 1.0 - self.settings.beta1)
            exp_avg_sq.mul_(self.settings.beta2).addcmul_(part, part, value=1.0 - self.settings.beta2)
            weight = weights.index_select(0, index)
            self._adam(weight, exp_avg, exp_avg_sq, lr)
            self.state["exp_avg"].index_copy_(0, index, exp_avg)
            self.state["exp_avg_sq"].index_copy_(0, index, exp_avg_sq)
            weights.index_copy_(0, index, weight)
            if weights is not self.values:
                self.values.index_copy_(0, index, weight.to(self.values.dtype))

    def _update_all(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        weights = self.state.get("master", self.values)
        starts = range(0, len(weights), self._rows_at_once)
        bounds = torch.searchsorted(rows, torch.tensor([*starts, len(weights)], device=rows.device)).tolist()
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            block = slice(start, start + self._rows_at_once)
            exp_avg, exp_avg_sq = self.state["exp_avg"][block], self.state["exp_avg_sq"][block]
            touched, part = rows[first:last] - start, grad[first:last]
            exp_avg.mul_(self.settings.beta1).index_add_(0, touched, part, alpha=1.0 - self.settings.beta1)
            exp_avg_sq.mul_(self.settings.beta2).index_add_(0, touched, part * part, alpha=1.0 - self.settings.beta2)
            self._adam(weights[block], exp_avg, exp_avg_sq, lr)
            if weights is not self.values:
                self.values[block].copy_(weights[block])
