"""Marks in training: at its interval a step is recorded, and phases go into metrics.jsonl beside the loss."""

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from mempar.marks import Span
from mempar.runtime.bringup import World
from mempar.runtime.model import Model
from mempar.runtime.profile.recorder import Recorder


class IntervalProfile:
    """Records every n-th step of a run on this rank."""

    def __init__(self, interval: int, world: World, model: Model) -> None:
        """Get ready.

        Args:
            interval: in steps; 0 records none.
            world: its marks are turned on and off.
            model: of the run.
        """
        self.interval = interval
        self._recorder = Recorder(world, model) if interval else None

    def is_due(self, step: int) -> bool:
        """Whether a step is recorded."""
        return bool(self.interval) and step % self.interval == 0

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Record a step if it is due."""
        if self._recorder is None or not self.is_due(step):
            return nullcontext()
        return self._recorder.step(step, reads=False)

    def report(self, step: int) -> dict[str, float]:
        """What was recorded of a step, equal on all ranks; empty unless it was due. Every rank must call it.

        Returns:
            `profile/PHASE_us` on the rank that spent most time on it, and `profile/PHASE_bytes` of all ranks together.
        """
        if self._recorder is None or not self.is_due(step):
            return {}
        mine = self._recorder.take().spans
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, phase_totals(mine))
        return joined(everyone)


def phase_totals(spans: list[Span]) -> dict[str, tuple[float, int]]:
    """Microseconds and bytes of each phase on this rank; of what is computed alone, no bytes but 0."""
    us: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for span in spans:
        us[span.phase] += span.end_ns - span.start_ns
        num_bytes[span.phase] += span.num_bytes
    return {phase: (taken / 1e3, num_bytes[phase]) for phase, taken in us.items()}


def joined(ranks: list[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Join the ranks' totals: the longest time, and all bytes."""
    found: dict[str, float] = {}
    for phase in sorted({phase for totals in ranks for phase in totals}):
        here = [totals[phase] for totals in ranks if phase in totals]
        found[f"profile/{phase}_us"] = max(us for us, _ in here)
        num_bytes = sum(num_bytes for _, num_bytes in here)
        if num_bytes:
            found[f"profile/{phase}_bytes"] = num_bytes
    return found
