"""One optimizer step over everything a rank holds: megatron's dense optimizer and the table's.

They are chained here rather than in megatron's ChainedOptimizer, whose members share one clip and
one learning rate: values have their own of both. The order is fixed: gradients are final, all norms
go into one reduction over the world, every rank sees the same numbers and so skips or steps together.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.memory.optimizer import OptimizerSettings, TableOptimizer, make_table_optimizer
from mempar.parallel.gradsync import sum_over_copies
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import TORCH_DTYPES, Model
from mempar.runtime.schedule import LrFactors

# Elements of the values' gradient squared at a time in float64, which bounds the temporaries.
_NORM_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step was, equal on all ranks.

    Attributes:
        loss: mean over the unmasked tokens of the global batch.
        grad_norm: norm of the dense gradient before clipping.
        memory_grad_norm: norm of the values' gradient before clipping; 0 for a dense model.
        tokens: unmasked tokens.
        applied: False when a number was not finite and the step was skipped.
    """

    loss: float
    grad_norm: float
    memory_grad_norm: float
    tokens: int
    applied: bool


class Optimizers:
    """The dense optimizer and, where this rank holds a shard, the table's.

    Attributes:
        dense: megatron's optimizer.
        table: the shard's optimizer; None on ranks without a shard.
    """

    def __init__(self, run: RunConfig, world: World, model: Model) -> None:
        self.run, self.world, self.model = run, world, model
        self.dense = mcore.get_megatron_optimizer(
            mcore.OptimizerConfig(
                optimizer="adam",
                lr=run.optim.lr,
                weight_decay=run.optim.weight_decay,
                adam_beta1=run.optim.beta1,
                adam_beta2=run.optim.beta2,
                adam_eps=run.optim.eps,
                # Clipped below, where all norms are known.
                clip_grad=0.0,
                bf16=run.train.dtype == "bf16",
                params_dtype=TORCH_DTYPES[run.train.dtype],
                use_distributed_optimizer=run.parallel.distributed_optimizer,
            ),
            model.wrapped,
        )
        model.transformer.grad_scale_func = self.dense.scale_loss
        self.table: TableOptimizer | None = None
        if model.table is not None:
            self.table = make_table_optimizer(
                run.memory.optimizer, model.table.values, model.table.part, table_settings(run)
            )

    @property
    def members(self) -> list[Any]:
        """Megatron's optimizers, one by one."""
        return list(getattr(self.dense, "chained_optimizers", [self.dense]))

    @torch.no_grad()
    def step(self, factors: LrFactors, num_tokens: Tensor, loss_sum: Tensor) -> StepReport:
        """Apply the gradients of one global batch.

        Args:
            factors: shares of the peak learning rates.
            num_tokens: unmasked tokens of the global batch, as left by megatron's finalisation.
            loss_sum: `[] float64`, sum of this rank's token losses; zero off the last stage.

        Returns:
            The step's numbers, equal on all ranks.
        """
        self.dense.prepare_grads()
        tokens = int(num_tokens)
        rows, row_grads = self._table_gradient(tokens)
        sums = torch.stack([loss_sum, self._dense_square_sum(), self._table_square_sum(row_grads)])
        # One reduction carries the loss and every norm: a number that is not finite anywhere reaches
        # every rank, and no rank returns before the others.
        dist.all_reduce(sums)
        loss, dense_square, table_square = sums.tolist()
        grad_norm, memory_grad_norm = dense_square**0.5, table_square**0.5
        finite = bool(torch.isfinite(sums).all())
        if finite:
            self._apply(factors, grad_norm, memory_grad_norm, rows, row_grads)
        return StepReport(
            loss=loss / max(1, tokens),
            grad_norm=grad_norm,
            memory_grad_norm=memory_grad_norm,
            tokens=tokens,
            applied=finite,
        )

    def _table_gradient(self, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Reduce deposits by row, sum them over copies, scale them as the dense gradient was."""
        if self.model.table is None or self.world.groups is None:
            return None, None
        rows, grads = self.model.table.take_gradient()
        rows, grads = sum_over_copies(rows, grads, self.world.groups.copies)
        return rows, grads.div_(max(1, tokens))

    def _dense_square_sum(self) -> Tensor:
        """This rank's share of the squared norm; each element of the model is counted once a world."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        whole_copy_elsewhere = self.world.placement.grid.dp_rank(self.world.rank) > 0 or (
            mcore.parallel_state.get_context_parallel_rank() > 0
        )
        if whole_copy_elsewhere and not self.run.parallel.distributed_optimizer:
            return total
        for member in self.members:
            for grad in member.get_main_grads_for_grad_norm():
                total += grad.double().square().sum() if grad.dtype != torch.float64 else grad.square().sum()
        return total

    def _table_square_sum(self, row_grads: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        groups = self.world.groups
        if row_grads is not None and groups is not None and groups.copies.rank == 0:
            for block in row_grads.split(max(1, _NORM_ELEMENTS // row_grads.shape[1])):
                total += block.double().square().sum()
        return total

    def _apply(
        self, factors: LrFactors, grad_norm: float, memory_grad_norm: float, rows: Tensor | None, grads: Tensor | None
    ) -> None:
        scale, values_scale = clip_factors(self.run, grad_norm, memory_grad_norm)
        for member in self.members:
            if scale < 1.0:
                main_grads = [param.grad for param in member.get_parameters() if param.grad is not None]
                if main_grads:
                    torch._foreach_mul_(main_grads, scale)
            for group in member.param_groups:
                group["lr"] = factors.dense * self.run.optim.lr
                # In megatron its learning-rate scheduler, which is not used here, applies this multiplier:
                # 0 for norms and biases.
                multiplier = group["wd_mult"] if "wd_mult" in group else group["pre_wd_mult"]
                group["weight_decay"] = multiplier * self.run.optim.weight_decay
            member.step_with_ready_grads()
        if self.table is not None and rows is not None and grads is not None:
            grads.mul_(values_scale)
            self.table.update(rows, grads, factors.values * self.run.values_lr)


def table_settings(run: RunConfig) -> OptimizerSettings:
    """What a table's optimizer takes from a run."""
    return OptimizerSettings(
        beta1=run.optim.beta1,
        beta2=run.optim.beta2,
        eps=run.optim.eps,
        weight_decay=run.values_weight_decay,
        moments=run.memory.moments_dtype,
        rounding=run.memory.rounding,
        column_tile=run.memory.column_tile,
        seed=run.train.seed,
    )


def clip_factors(run: RunConfig, grad_norm: float, memory_grad_norm: float) -> tuple[float, float]:
    """What the dense and the values' gradients are multiplied by: each for its own norm, or both for the joint one."""
    if run.memory.enabled and run.memory.clip == "joint":
        joint = clip_factor(run.optim.clip_grad, math.hypot(grad_norm, memory_grad_norm))
        return joint, joint
    return clip_factor(run.optim.clip_grad, grad_norm), clip_factor(run.memory.clip_grad, memory_grad_norm)


def clip_factor(limit: float, norm: float) -> float:
    """What gradients are multiplied by so that their norm stays within the limit; 0 is no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
