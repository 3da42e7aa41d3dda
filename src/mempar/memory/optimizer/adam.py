"""Adam on a shard: exact dense AdamW, or the touched rows only. The package's docstring has the formulas."""

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.row_update import Adam, native, update_rows
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
            update_rows(self.rows, self.rule(lr), rows, grad, step=self.step, backend=self.settings.backend)
        else:
            self._update_all(rows.long(), grad.to(self.wide), lr)

    def rule(self, lr: float) -> Adam:
        """What moves rows in a step with this learning rate."""
        settings = self.settings
        return Adam(
            exp_avg=self.state["exp_avg"],
            exp_avg_sq=self.state["exp_avg_sq"],
            lr=lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def _update_all(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        rule, table = self.rule(lr), self.rows
        blocks = list(native.blocks(len(self.values), self.values.shape[1], native.CHUNK_ELEMENTS))
        ends = torch.tensor([0, *(block.stop for block in blocks)], device=rows.device)
        bounds = torch.searchsorted(rows, ends).tolist()
        for block, first, last in zip(blocks, bounds, bounds[1:], strict=False):
            exp_avg, exp_avg_sq = self.state["exp_avg"][block], self.state["exp_avg_sq"][block]
            touched, part = rows[first:last] - block.start, grad[first:last]
            exp_avg.mul_(self.settings.beta1).index_add_(0, touched, part, alpha=1.0 - self.settings.beta1)
            exp_avg_sq.mul_(self.settings.beta2).index_add_(0, touched, part * part, alpha=1.0 - self.settings.beta2)
            weight = table.read(block)
            native.move_by_adam(weight, exp_avg, exp_avg_sq, rule, self.step)
            table.write(block, weight, self.step)
