"""Loss spikes: when a step counts as one, and when it began.

A step spikes when its loss exceeds `train.spike_factor` times the median of the last
`train.spike_window` applied losses (judged once there are as many), or when it is the last of
`train.spike_skips` skipped steps in a row. Everything is judged from numbers that are equal on all
ranks, so all decide alike. What is done about a spike is decided in rollback.py.
"""

import statistics
from dataclasses import dataclass

from mempar.runtime.config import TrainConfig
from mempar.runtime.optim import StepReport
from mempar.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step at which training went wrong.

    Attributes:
        step: its number, counted from 1.
        began: the first step of the run of elevated or skipped steps that ended in it.
        loss: its loss; may be not finite.
        median: of the losses it was judged by; None when it was judged by skipped steps alone.
        skips: skipped steps in a row, this one included.
    """

    step: int
    began: int
    loss: float
    median: float | None
    skips: int

    def __str__(self) -> str:
        """Say what happened."""
        if self.skips:
            return f"step {self.step} is the last of {self.skips} skipped steps in a row"
        assert self.median is not None
        return f"the loss {self.loss:.4g} of step {self.step} is {self.loss / self.median:.3g} times the typical one"


def find_spike(settings: TrainConfig, progress: Progress, report: StepReport) -> Spike | None:
    """Judge a step before it is counted.

    A spike began with the first of the steps up to it that were all skipped or had losses nearer to the
    threshold than to the median: a loss that climbs for some steps before it is found began to climb then.

    Args:
        settings: factor, window and steps.
        progress: the steps before it.
        report: its numbers.

    Returns:
        The spike, or None.
    """
    step = progress.step + 1
    skips = 0 if report.applied else progress.skips_in_a_row + 1
    losses = [loss for _, loss in progress.losses]
    median = statistics.median(losses) if len(losses) == settings.spike_window else None
    factor = settings.spike_factor
    high = factor and median is not None and report.applied and report.loss > factor * median
    if not high and skips != settings.spike_skips:
        return None
    began = step - max(0, skips - 1)
    if median is not None:
        elevated = median * (1.0 + factor) / 2.0
        for earlier, loss in reversed(progress.losses):
            if loss <= elevated:
                began = earlier + 1
                break
    return Spike(step=step, began=began, loss=report.loss, median=median, skips=skips)
