"""Which parameters and table rows went wrong in a step: names for messages, gathered from all ranks.

Nothing here runs in an ordinary step, and nothing is kept for it from step to step: it looks at the
gradients of the step in hand, before they are clipped and applied, and at Adam's moments. Every rank
must call the functions, in the same order; each sends a few kilobytes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.dims import TableSlice
from mempar.parallel.collectives import MemberGroup
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.logical import own_parameters
from mempar.runtime.optim import Optimizers, RowGradient
from mempar.runtime.tables import Table

# Names in a message, of parameters and of rows each.
NUM_NAMED = 5


def name_not_finite(optimizers: Optimizers, gradients: dict[str, RowGradient]) -> list[str]:
    """Name parameters and table rows whose gradients hold infinities or NaN.

    Args:
        optimizers: of this rank, with the gradients of the step.
        gradients: of the tables on this rank, by their names.

    Returns:
        A few phrases, equal on all ranks: parameters in alphabetical order with the ranks on which they are
        not finite, then slots of each table in ascending order.
    """
    parameters = [
        name for name, param in _named_parameters(optimizers) if not bool(torch.isfinite(param.main_grad).all())
    ]
    bad_rows: dict[str, list[int]] = {}
    for table in optimizers.model.tables:
        rows, grads = gradients[table.name]
        finite = torch.cat([block.isfinite().all(-1) for block in grads.split(4096)])
        bad = rows[~finite][: NUM_NAMED + 1].long() + table.shard.part.row_start
        if len(bad):
            bad_rows[table.name] = bad.tolist()
    found = _gather(optimizers.world, (parameters, bad_rows))
    where: dict[str, list[int]] = {}
    slots_of: dict[str, tuple[set[int], list[int]]] = {}
    for rank, (names, rows_of) in enumerate(found):
        for name in names:
            where.setdefault(name, []).append(rank)
        for name, bad in rows_of.items():
            slots, holders = slots_of.setdefault(name, (set(), []))
            slots.update(bad)
            holders.append(rank)
    phrases = [f"{name} (on {_ranks(ranks)})" for name, ranks in sorted(where.items())[:NUM_NAMED]]
    phrases += [f"{len(where) - NUM_NAMED} more parameters"] if len(where) > NUM_NAMED else []
    for name, (slots, holders) in sorted(slots_of.items()):
        listed = ", ".join(map(str, sorted(slots)[:NUM_NAMED])) + (" and more" if len(slots) > NUM_NAMED else "")
        phrases.append(f"rows {listed} of {name} (on {_ranks(holders)})")
    return phrases


def name_diverged(optimizers: Optimizers, gradients: dict[str, RowGradient]) -> list[str]:
    """Name the parameters whose gradient grew most, and the table rows with the largest gradient.

    A parameter's growth is the norm of its gradient in this step, before clipping, over the norm of its
    running root mean square: the square root of the sum of Adam's `exp_avg_sq`, corrected for its start
    at zero, which is an average over about 1 / (1 - beta2) steps of the gradients that were applied
    (after clipping). Sums run over all shares of a parameter, so neither tensor parallelism nor the
    distributed optimizer changes them. Rows are ranked by the norm of their whole gradient in this step,
    summed over tokens, replicas and column shards.

    Args:
        optimizers: as in `name_not_finite`.
        gradients: as in `name_not_finite`.

    Returns:
        A few phrases, equal on all ranks, the worst first.
    """
    largest_rows = {
        table.name: _largest_rows(optimizers, table, *gradients[table.name]) for table in optimizers.model.tables
    }
    found = _gather(optimizers.world, (_squares(optimizers), largest_rows))
    shares = {key: squares for parameters, _ in found for key, squares in parameters.items()}
    squares: dict[str, tuple[float, float]] = {}
    for (name, _), (now, typical) in sorted(shares.items()):
        before = squares.get(name, (0.0, 0.0))
        squares[name] = before[0] + now, before[1] + typical
    growth = {
        name: (math.sqrt(now / typical) if typical else math.inf, math.sqrt(now))
        for name, (now, typical) in squares.items()
        if now
    }
    worst = sorted(growth.items(), key=lambda item: (-item[1][0], item[0]))[:NUM_NAMED]
    phrases = [f"{name} (gradient {norm:.3g}, {ratio:.3g} times its typical one)" for name, (ratio, norm) in worst]
    for name in dict.fromkeys(name for _, largest in found for name in largest):
        norms = {slot: norm for _, largest in found for slot, norm in largest.get(name, [])}
        best = sorted(norms.items(), key=lambda item: (-item[1], item[0]))[:NUM_NAMED]
        if best:
            phrases.append(f"{name}: rows " + ", ".join(f"{slot} (gradient {norm:.3g})" for slot, norm in best))
    return phrases


def _squares(optimizers: Optimizers) -> dict[tuple[str, tuple[int, ...]], tuple[float, float]]:
    """For each share of a parameter on this rank: squared norms of its gradient, and of its typical one.

    The key is the name and which share it is; ranks with the same key hold the same numbers.
    """
    state, run = mcore.parallel_state, optimizers.run
    tp_rank, beta2 = state.get_tensor_model_parallel_rank(), run.optim.beta2
    # The distributed optimizer gives every data-parallel rank a share of its own.
    data_share = optimizers.world.rank if run.parallel.distributed_optimizer else -1
    names = {id(param): name for name, param in _named_parameters(optimizers)}
    split = {id(param) for param in _split_parameters(optimizers)}
    found = {}
    for member in optimizers.members:
        for param, main in _main_parameters(member):
            moments = member.optimizer.state.get(main)
            if id(param) not in names or main is None or main.grad is None or not moments:
                continue
            # TransformerEngine's Adam counts steps in its groups.
            step = float(moments.get("step", member.optimizer.param_groups[0].get("step", 0)))
            if not step:
                continue
            correction = 1.0 - beta2**step
            now, typical = main.grad.double().square().sum(), moments["exp_avg_sq"].double().sum() / correction
            if id(param) in split or tp_rank == 0:
                found[names[id(param)], (tp_rank, data_share)] = float(now), float(typical)
    return found


def _main_parameters(member: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of a model's parameter and what a member of megatron's optimizers steps for it."""
    if hasattr(member, "model_param_group_index_map"):
        for param, (group, position) in member.model_param_group_index_map.items():
            yield param, member.optimizer.param_groups[group]["params"][position]
    elif hasattr(member, "float16_groups"):
        for params, mains in zip(member.float16_groups, member.fp32_from_float16_groups, strict=True):
            yield from zip(params, mains, strict=True)
        for params in member.fp32_from_fp32_groups:
            yield from ((param, param) for param in params)
    else:
        yield from ((param, param) for param in member.get_parameters())


def _named_parameters(optimizers: Optimizers) -> Iterator[tuple[str, Any]]:
    for logical in own_parameters(optimizers.model.chunks):
        if logical.param.requires_grad:
            yield logical.name, logical.param


def _split_parameters(optimizers: Optimizers) -> Iterator[Any]:
    for chunk in optimizers.model.chunks:
        yield from (param for param in chunk.parameters() if getattr(param, "tensor_model_parallel", False))


def _largest_rows(optimizers: Optimizers, table: Table, rows: Tensor, grads: Tensor) -> list[tuple[int, float]]:
    """Slots of this rank's rows with the largest gradients over all columns, and their norms."""
    groups, part = optimizers.world.groups, table.shard.part
    assert groups is not None
    squares = torch.cat([block.double().square().sum(-1) for block in grads.split(4096)])
    best, place = _sum_over_columns(squares, part, groups.memory).topk(min(NUM_NAMED, len(squares)))
    slots = rows[place].long() + part.row_start
    return list(zip(slots.tolist(), best.sqrt().tolist(), strict=True))


def _sum_over_columns(squares: Tensor, part: TableSlice, memory: MemberGroup) -> Tensor:
    """Add the other column shards' `[U]` numbers: shards of the same rows were touched in the same rows."""
    first_rows = [row for (row,) in memory.exchange_counts([[part.row_start]] * memory.size, squares.device, "naming")]
    shards = first_rows.count(part.row_start)
    sizes = [len(squares) if row == part.row_start else 0 for row in first_rows]
    return memory.all_to_all(squares.repeat(shards), sizes, sizes, "naming").view(shards, len(squares)).sum(0)


def _gather(world: World, mine: Any) -> list[Any]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, mine)
    return found


def _ranks(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:NUM_NAMED]))
    return f"rank{'s' if len(ranks) > 1 else ''} {few}" + (" and more" if len(ranks) > NUM_NAMED else "")
