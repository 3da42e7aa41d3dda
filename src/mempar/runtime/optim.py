"""One optimizer step over everything a rank holds: megatron's dense optimizer and the tables'.

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

from mempar.memory.optimizer import AdamSettings, TableAdam
from mempar.memory.usage import RowHistory
from mempar.parallel.gradsync import sum_over_copies
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.tables import TORCH_DTYPES, Table


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step was, equal on all ranks.

    Attributes:
        loss: mean over the unmasked tokens of the global batch.
        grad_norm: norm of the dense gradient before clipping.
        memory_grad_norms: norm of the gradient of each memory's tables before clipping, by its name.
        tokens: unmasked tokens.
        applied: False when a number was not finite and the step was skipped.
    """

    loss: float
    grad_norm: float
    memory_grad_norms: dict[str, float]
    tokens: int
    applied: bool

    @property
    def memory_grad_norm(self) -> float:
        """Norm of all tables' gradients before clipping; 0 for a dense model."""
        return math.hypot(*self.memory_grad_norms.values())


# Touched rows [U] int32 of a shard, ascending, and their gradients [U, D_j].
RowGradient = tuple[Tensor, Tensor]


class Optimizers:
    """The dense optimizer and one for each table of which this rank holds a shard.

    Attributes:
        dense: megatron's optimizer.
        tables: the shards' optimizers by the tables' names, in global order.
        histories: when each row of a memory on this rank was read last, by the memory's name; those with
            usage_interval=0 have none.
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
        self.tables = {table.name: self._table_optimizer(table) for table in model.tables}
        # All tables of a memory are read at the same rows.
        self.histories = {
            table.memory: RowHistory(table.shard.part.num_rows, world.device)
            for table in model.tables
            if table.config.usage_interval
        }

    def _table_optimizer(self, table: Table) -> TableAdam:
        run = self.run
        settings = AdamSettings(
            beta1=run.optim.beta1,
            beta2=run.optim.beta2,
            eps=run.optim.eps,
            weight_decay=run.values_weight_decay_of(table.config),
        )
        return TableAdam(table.shard.values, settings, touched_only=table.config.optimizer == "row_adam")

    @property
    def members(self) -> list[Any]:
        """Megatron's optimizers, one by one."""
        return list(getattr(self.dense, "chained_optimizers", [self.dense]))

    @torch.no_grad()
    def step(self, factor: float, num_tokens: Tensor, loss_sum: Tensor) -> StepReport:
        """Apply the gradients of one global batch.

        Args:
            factor: share of the peak learning rates.
            num_tokens: unmasked tokens of the global batch, as left by megatron's finalisation.
            loss_sum: `[] float64`, sum of this rank's token losses; zero off the last stage.

        Returns:
            The step's numbers, equal on all ranks.
        """
        self.dense.prepare_grads()
        tokens = int(num_tokens)
        gradients = self._table_gradients(tokens)
        for memory, history in self.histories.items():
            history.mark(gradients[f"{memory}.values"][0])
        sums = torch.stack([loss_sum, self._dense_square_sum(), *self._table_square_sums(gradients)])
        # One reduction carries the loss and every norm: a number that is not finite anywhere reaches
        # every rank, and no rank returns before the others.
        dist.all_reduce(sums)
        loss, dense_square, *memory_squares = sums.tolist()
        finite = bool(torch.isfinite(sums).all())
        report = StepReport(
            loss=loss / max(1, tokens),
            grad_norm=dense_square**0.5,
            memory_grad_norms={
                name: square**0.5 for name, square in zip(self.run.memories, memory_squares, strict=True)
            },
            tokens=tokens,
            applied=finite,
        )
        if finite:
            self._apply(factor, report, gradients)
        return report

    def _table_gradients(self, tokens: int) -> dict[str, RowGradient]:
        """Reduce deposits by row, sum them over copies, scale them as the dense gradient was."""
        gradients = {}
        for table in self.model.tables:
            rows, grads = sum_over_copies(*table.shard.take_gradient(), table.copies)
            gradients[table.name] = (rows, grads.div_(max(1, tokens)))
        return gradients

    def _dense_square_sum(self) -> Tensor:
        """This rank's share of the squared norm; each element of the model is counted once a world."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        grid, rank = self.world.placement.grid, self.world.rank
        for member in self.members:
            # Experts have fewer copies than other parameters: each expert-parallel rank has others.
            if _is_of_experts(member):
                copy_elsewhere = grid.expert_dp_rank(rank) > 0
            else:
                copy_elsewhere = grid.dp_rank(rank) > 0 or mcore.parallel_state.get_context_parallel_rank() > 0
            if copy_elsewhere and not self.run.parallel.distributed_optimizer:
                continue
            for grad in member.get_main_grads_for_grad_norm():
                total += grad.double().square().sum() if grad.dtype != torch.float64 else grad.square().sum()
        return total

    def _table_square_sums(self, gradients: dict[str, RowGradient]) -> list[Tensor]:
        """This rank's share of the squared norm of each memory's tables; each shard is counted once."""
        totals = {name: torch.zeros((), dtype=torch.float64, device=self.world.device) for name in self.run.memories}
        for table in self.model.tables:
            if table.copies.rank == 0:
                for block in gradients[table.name][1].split(4096):
                    totals[table.memory] += block.double().square().sum()
        return list(totals.values())

    def _apply(self, factor: float, report: StepReport, gradients: dict[str, RowGradient]) -> None:
        scale = clip_factor(self.run.optim.clip_grad, report.grad_norm)
        for member in self.members:
            if scale < 1.0:
                main_grads = [param.grad for param in member.get_parameters() if param.grad is not None]
                if main_grads:
                    torch._foreach_mul_(main_grads, scale)
            for group in member.param_groups:
                group["lr"] = factor * self.run.optim.lr
                # In megatron its learning-rate scheduler, which is not used here, applies this multiplier:
                # 0 for norms and biases.
                multiplier = group["wd_mult"] if "wd_mult" in group else group["pre_wd_mult"]
                group["weight_decay"] = multiplier * self.run.optim.weight_decay
            member.step_with_ready_grads()
        for table in self.model.tables:
            rows, grads = gradients[table.name]
            grads.mul_(clip_factor(table.config.clip_grad, report.memory_grad_norms[table.memory]))
            self.tables[table.name].update(rows, grads, factor * self.run.values_lr_of(table.config))


def _is_of_experts(member: Any) -> bool:
    """Whether one of megatron's optimizers is that of the experts."""
    return any(group["is_expert_parallel"] for group in member.param_groups)


def clip_factor(limit: float, norm: float) -> float:
    """What gradients are multiplied by so that their norm stays within the limit; 0 is no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
