"""Plans as JSON: `plans`, best first, and `rejected`, with reasons."""

import shlex
from collections.abc import Sequence
from typing import Any

from mempar.runtime.estimate import StageBytes
from mempar.tools.plan.figures import figures_of
from mempar.tools.plan.planner import Planned
from mempar.tools.plan.report import launch_arguments
from mempar.tools.plan.search import Plan, all_reasons
from mempar.tools.plan.settings import settings_of
from mempar.tools.plan.traffic import traffic_of

# Keys of a layout, as in the config.
_PARALLEL = (
    "tp", "pp", "vpp", "cp", "ep", "mp", "mp_rows", "mp_hops", "sequence_parallel", "distributed_optimizer",
)  # fmt: skip


def document(planned: Planned, recipe: Sequence[str]) -> dict[str, Any]:
    """Everything that was planned, as plain values; times in seconds.

    Args:
        planned: the plans.
        recipe: what the user called the run, overrides included.
    """
    return {
        "recipe": shlex.join(recipe),
        "gpus": planned.num_ranks,
        "hardware": planned.hardware.label,
        "memory_bytes": planned.hardware.memory_bytes,
        "memory_note": planned.memory_note or None,
        "changes": list(planned.changes),
        "enough_gpus": planned.enough_gpus or None,
        "advice": list(planned.advice),
        "nearest_bytes_per_gpu": _bytes(planned.nearest.worst) if planned.nearest else None,
        "own_layout": _plan(planned, planned.own, 0, recipe) if planned.own else planned.own_reason,
        "looked_at": planned.found.num_looked,
        "slower": planned.found.num_slower,
        "plans": [_plan(planned, plan, place, recipe) for place, plan in enumerate(planned.found.plans, 1)],
        "rejected": [
            {"reason": each.reason, "layouts": each.count, "bytes_per_gpu": each.num_bytes or None}
            | ({"nearest": _layout_keys(each.run)} if each.num_bytes else {})
            for each in all_reasons(planned.found)
        ],
    }


def _plan(planned: Planned, plan: Plan, place: int, recipe: Sequence[str]) -> dict[str, Any]:
    layout, time = plan.layout, plan.time
    figures = figures_of(plan, planned.hardware)
    return {
        "place": place,
        **_layout_keys(layout.run),
        "dp": layout.grid.dp,
        "micro_batches": time.num_micro_batches,
        "tables": layout.placement.reason,
        "settings": settings_of(planned.given, layout.run),
        "launch": launch_arguments(planned, plan, recipe),
        "changes": planned.changes_of(plan),
        "step_seconds": time.seconds,
        "step_parts": {name: us / 1e6 for name, us in sorted(time.parts.items(), key=lambda part: -part[1])},
        "step_sorts": time.by_sort,
        "tokens_per_second_per_gpu": figures.tokens_per_second_per_gpu,
        "mfu": figures.mfu,
        "bytes_per_gpu": _bytes(plan.estimate.worst),
        "memory_share": figures.memory_share,
        "tokens": figures.tokens,
        "days": figures.days,
        "gpu_hours": figures.gpu_hours,
        "communication": [
            {"name": each.name, "link": each.link, "bytes_per_gpu": round(each.sent_bytes), "seconds": each.seconds}
            for each in traffic_of(layout, planned.hardware, time)
        ],
    }


def _layout_keys(run: Any) -> dict[str, Any]:
    sizes = {name: getattr(run.parallel, name) for name in _PARALLEL}
    return {**sizes, "micro_batch_size": run.train.micro_batch_size, "recompute": run.train.recompute}


def _bytes(stage: StageBytes) -> dict[str, int]:
    """By kind; they do not all exist at once, `total` is the most at any time."""
    return {**stage.by_kind(), "total": stage.total}
