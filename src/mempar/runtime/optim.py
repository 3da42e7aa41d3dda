"""One optimizer step over everything a rank holds: megatron's dense optimizer and the tables'.

They are chained here rather than in megatron's ChainedOptimizer, whose members share one clip and
one learning rate: values have their own of both. The order is fixed: gradients are final, all norms
go into one reduction over the world, every rank sees the same numbers and so skips or steps together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.dims import TableSlice
from mempar.memory.optimizer import OptimizerSettings, TableOptimizer, make_table_optimizer
from mempar.memory.usage import RowHistory
from mempar.parallel.gradsync import sum_over_copies
from mempar.runtime import mcore
from mempar.runtime.ballots import Ballots
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.schedule import LrFactors
from mempar.runtime.tables import TORCH_DTYPES, Table

# Elements of a gradient that are squared in float64 at a time: few enough for their copies, many enough for a GPU.
_NORM_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step was, equal on all ranks.

    Attributes:
        loss: mean over the unmasked tokens of the global batch.
        grad_norm: norm of the dense gradient before clipping.
        memory_grad_norms: norm of the gradient of each memory's tables before clipping, by its name.
        tokens: unmasked tokens.
        applied: False when a number was not finite and the step was skipped.
        balance_losses: mean of the balance losses of each memory's lookups, before the coefficient, by its name; 0
            where it is off.
    """

    loss: float
    grad_norm: float
    memory_grad_norms: dict[str, float]
    tokens: int
    applied: bool
    balance_losses: dict[str, float]

    @property
    def memory_grad_norm(self) -> float:
        """Norm of all tables' gradients before clipping; 0 for a dense model."""
        return math.hypot(*self.memory_grad_norms.values())


# Touched rows [U] int32 of a shard, ascending, and their gradients [U, D_j].
RowGradient = tuple[Tensor, Tensor]
# Looks at a step's numbers and at the tables' gradients by their names, on every rank, before they are clipped and
# applied or dropped.
Inspector = Callable[[StepReport, dict[str, RowGradient]], None]


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
        self.tables = {table.name: table_optimizer(run, table) for table in model.tables}
        # All tables of a memory are read at the same rows.
        self.histories = {
            table.memory: RowHistory(table.shard.part.num_rows, world.device)
            for table in model.tables
            if table.config.usage_interval
        }

    def place_of(self, table: Table, key: str) -> TableSlice:
        """Where a tensor of a table, its values or state, lies in what all shards make up.

        Args:
            table: the table.
            key: the table's name, or that and the state's.
        """
        if key == table.name:
            return table.shard.part
        return self.tables[table.name].place_of(key.removeprefix(f"{table.name}."))

    @property
    def members(self) -> list[Any]:
        """Megatron's optimizers, one by one."""
        return list(getattr(self.dense, "chained_optimizers", [self.dense]))

    @torch.no_grad()
    def step(
        self,
        factors: LrFactors,
        num_tokens: Tensor,
        loss_sum: Tensor,
        inspect: Inspector | None = None,
        ballots: Ballots | None = None,
    ) -> StepReport:
        """Apply the gradients of one global batch.

        Args:
            factors: shares of the peak learning rates.
            num_tokens: unmasked tokens of the global batch, as left by megatron's finalisation.
            loss_sum: `[] float64`, sum of this rank's token losses; zero off the last stage.
            inspect: called in between, when all numbers are known and nothing is changed yet.
            ballots: what ranks agree about in this step's reduction.

        Returns:
            The step's numbers, equal on all ranks.
        """
        self.dense.prepare_grads()
        tokens = int(num_tokens)
        gradients = self._table_gradients(tokens)
        for memory, history in self.histories.items():
            history.mark(gradients[f"{memory}.values"][0])
        dense, dense_rest = self._dense_squares()
        memories, memory_rest = self._table_squares(gradients)
        own = torch.stack([loss_sum, dense, dense_rest, *memories, memory_rest])
        ballots = ballots or Ballots()
        wishes = torch.tensor(ballots.wishes(), dtype=own.dtype, device=own.device)
        sums = torch.cat([own, (~torch.isfinite(own)).sum()[None], wishes, self._balance_totals()])
        # One reduction carries the loss and every norm: a number that is not finite anywhere reaches
        # every rank, and no rank returns before the others.
        dist.all_reduce(sums)
        totals = sums.tolist()
        loss, dense_square, _, *memory_squares = totals[: len(own) - 1]
        balance_at = len(own) + 1 + len(wishes)
        ballots.settle(totals[len(own) + 1 : balance_at])
        names = list(self.run.memories)
        report = StepReport(
            loss=loss / max(1, tokens),
            grad_norm=dense_square**0.5,
            memory_grad_norms={name: square**0.5 for name, square in zip(names, memory_squares, strict=True)},
            tokens=tokens,
            # A sum of finite numbers may overflow.
            applied=bool(torch.isfinite(sums).all()) and not totals[len(own)],
            balance_losses=dict(zip(names, _means(totals[balance_at:]), strict=True)),
        )
        if inspect is not None:
            inspect(report, gradients)
        if report.applied:
            self._apply(factors, report, gradients)
        return report

    def _balance_totals(self) -> Tensor:
        """`[2 * memories] float64`: each memory's balance losses on this rank, weighted by tokens, and its tokens."""
        none = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        access = self.model.access
        return torch.cat(
            [none[:0], *(access[name].balance.take(none) if name in access else none for name in self.run.memories)]
        )

    def _table_gradients(self, tokens: int) -> dict[str, RowGradient]:
        """Reduce deposits by row, sum them over copies, scale them as the dense gradient was."""
        gradients = {}
        for table in self.model.tables:
            rows, grads = sum_over_copies(*table.shard.take_gradient(), table.copies, backend=self.world.backend)
            gradients[table.name] = (rows, grads.div_(max(1, tokens)))
        return gradients

    def _dense_squares(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the squared norm, each element of the model once a world; and what is left of its own.

        The rest are copies of what other ranks count. It is computed for its being finite: a copy that went
        wrong on this rank alone would otherwise be applied.
        """
        counted = torch.zeros((), dtype=torch.float64, device=self.world.device)
        rest = torch.zeros_like(counted)
        for member in self.members:
            counts = self.run.parallel.distributed_optimizer or not self._copy_elsewhere(member)
            once_ids = {id(grad) for grad in member.get_main_grads_for_grad_norm()} if counts else set()
            for grad in (param.grad for param in member.get_parameters() if param.grad is not None):
                square = _sum_of_squares(grad)
                if id(grad) in once_ids:
                    counted += square
                else:
                    rest += square
        return counted, rest

    def _copy_elsewhere(self, member: Any) -> bool:
        """Whether another rank with a lower number holds a copy of what an optimizer updates."""
        grid, rank = self.world.placement.grid, self.world.rank
        # Experts have fewer copies than other parameters: each expert-parallel rank has others.
        if _is_of_experts(member):
            return grid.expert_dp_rank(rank) > 0
        return grid.dp_rank(rank) > 0 or mcore.parallel_state.get_context_parallel_rank() > 0

    def _table_squares(self, gradients: dict[str, RowGradient]) -> tuple[list[Tensor], Tensor]:
        """The same for each memory's tables: one of the copies of a shard counts."""
        totals = {name: torch.zeros((), dtype=torch.float64, device=self.world.device) for name in self.run.memories}
        rest = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for table in self.model.tables:
            total = totals[table.memory] if table.copies.rank == 0 else rest
            total += _sum_of_squares(gradients[table.name][1])
        return list(totals.values()), rest

    def _apply(self, factors: LrFactors, report: StepReport, gradients: dict[str, RowGradient]) -> None:
        scale, values_scales = clip_factors(self.run, report.grad_norm, report.memory_grad_norms)
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
        for table in self.model.tables:
            rows, grads = gradients[table.name]
            grads.mul_(values_scales[table.memory])
            rate = factors.values[table.memory] * self.run.values_lr_of(table.config)
            with self.world.marks.span("row_update"):
                self.tables[table.name].update(rows, grads, rate)


def table_optimizer(run: RunConfig, table: Table) -> TableOptimizer:
    """Make the optimizer of one shard as a run wants it."""
    config = table.config
    settings = OptimizerSettings(
        beta1=run.optim.beta1,
        beta2=run.optim.beta2,
        eps=run.optim.eps,
        weight_decay=run.values_weight_decay_of(config),
        moments=config.moments_dtype,
        rounding=config.rounding,
        column_tile=config.column_tile,
        # No two tables of a model round with the same bits.
        seed=run.train.seed + (table.number << 32),
        backend=table.shard.backend,
    )
    return make_table_optimizer(config.optimizer, table.shard.values, table.shard.part, settings)


def clip_factors(
    run: RunConfig, grad_norm: float, memory_grad_norms: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """What the dense gradient and each memory's are multiplied by: for its own norm, or for the joint one."""
    joint = [name for name, memory in run.memories.items() if memory.clip == "joint"]
    together = clip_factor(run.optim.clip_grad, math.hypot(grad_norm, *(memory_grad_norms[name] for name in joint)))
    values = {
        name: together if name in joint else clip_factor(memory.clip_grad, memory_grad_norms[name])
        for name, memory in run.memories.items()
    }
    return together, values


def _sum_of_squares(grad: Tensor) -> Tensor:
    """`[] float64`, without a copy of the whole."""
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for block in grad.reshape(-1).split(_NORM_ELEMENTS):
        total += block.double().square().sum()
    return total


def _is_of_experts(member: Any) -> bool:
    """Whether one of megatron's optimizers is that of the experts."""
    return any(group["is_expert_parallel"] for group in member.param_groups)


def _means(totals: list[float]) -> list[float]:
    """Means from pairs of a sum and a count."""
    return [total / max(1.0, count) for total, count in zip(totals[::2], totals[1::2], strict=True)]


def clip_factor(limit: float, norm: float) -> float:
    """What gradients are multiplied by so that their norm stays within the limit; 0 is no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
