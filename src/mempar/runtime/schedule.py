"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

import math
from dataclasses import replace
from typing import NamedTuple

from mempar.runtime.config import OptimConfig, RunConfig


class LrFactors(NamedTuple):
    """Shares of the peak learning rates: of the dense parameters, and of each memory's values by its name."""

    dense: float
    values: dict[str, float]


def full_rates(run: RunConfig) -> LrFactors:
    """The peaks themselves: for steps outside any schedule, in benchmarks and tests."""
    return LrFactors(1.0, dict.fromkeys(run.memories, 1.0))


def lr_factors(run: RunConfig, step: int) -> LrFactors:
    """Shares of the peaks at a 0-based step; values may follow another curve (`memory.schedule`)."""
    own = {
        name: replace(run.optim, schedule=memory.schedule or run.optim.schedule)
        for name, memory in run.memories.items()
    }
    values = {name: lr_factor(optim, step, run.train.steps) for name, optim in own.items()}
    return LrFactors(lr_factor(run.optim, step, run.train.steps), values)


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step.

    The dense parameters and the values each start from their own peak; the floor is `min_lr / lr` for both.

    Args:
        optim: warm-up, decay and floor.
        step: 0-based.
        total_steps: length of the run, where the decay ends unless `decay_steps` says otherwise.

    Returns:
        A number in [0, 1].
    """
    floor = optim.min_lr / optim.lr if optim.lr else 0.0
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    end = optim.decay_steps or total_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        start = end - optim.wsd_decay_steps
        if step < start:
            return 1.0
        progress = (step - start + 1) / max(1, optim.wsd_decay_steps)
        return _mix(floor, 1.0 - min(1.0, progress))
    progress = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    if optim.schedule == "linear":
        return _mix(floor, 1.0 - progress)
    return _mix(floor, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _mix(floor: float, share: float) -> float:
    return floor + (1.0 - floor) * share
