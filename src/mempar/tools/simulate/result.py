"""What a simulated step says: its time, what ranks spend it on, the links' load and the critical path; JSON."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mempar.parallel.links import Topology
from mempar.tools.simulate.critical_path import critical_path, path_words
from mempar.tools.simulate.step import Step
from mempar.tools.simulate.timeline import BUBBLE, COMPUTE, EXPOSED, KINDS, WAITING

_PS_PER_SECOND = 1e12
_BYTES_PER_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class PhaseSeconds:
    """Seconds of a phase in a step, of a rank on average.

    Attributes:
        phase: its name.
        compute: it computes.
        exposed: it sends and receives, and does nothing else.
        waiting: it waits for ranks of its own stage, which still compute.
        bubble: it waits for other stages.
        overlapped: it sends and receives while it computes.
    """

    phase: str
    compute: float = 0.0
    exposed: float = 0.0
    waiting: float = 0.0
    bubble: float = 0.0
    overlapped: float = 0.0

    @property
    def total(self) -> float:
        """What it takes of the step."""
        return self.compute + self.exposed + self.waiting + self.bubble


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """A pipeline stage, of a rank on average.

    Attributes:
        stage: its number.
        compute: share of the step; likewise `exposed`, `waiting` and `bubble`, which add up to 1 with it.
        inside_utilisation: share of what a rank's link inside its node could carry in the step.
        across_utilisation: and of that to other nodes.
        entries_max_over_mean: entries of the busiest owner of rows over an owner's mean; 1 where reads fall evenly.
    """

    stage: int
    compute: float
    exposed: float
    waiting: float
    bubble: float
    inside_utilisation: float
    across_utilisation: float
    entries_max_over_mean: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    Attributes:
        run: name of the run.
        hardware: label of the device.
        num_ranks: how many.
        layout: sizes of the parallel dimensions.
        settings: what made ranks differ.
        step_seconds: the step.
        planned_seconds: the planner's closed form, for even reads and equal ranks.
        phases: longest first.
        stages: in order.
        ranks: seconds of every world rank, by kind.
        path: seconds on the critical path by (kind, phase), longest first.
        path_words: the same in words.
    """

    run: str
    hardware: str
    num_ranks: int
    layout: dict[str, int]
    settings: dict[str, Any]
    step_seconds: float
    planned_seconds: float
    phases: list[PhaseSeconds]
    stages: list[StageSummary]
    ranks: dict[str, list[float]] = field(repr=False)
    path: list[tuple[str, str, float]]
    path_words: str

    @property
    def bubble_share(self) -> float:
        """Share of the step in which a rank waits for other stages, on average."""
        return sum(stage.bubble for stage in self.stages) / len(self.stages)

    @property
    def waiting_share(self) -> float:
        """Share of the step in which a rank waits for others of its stage, on average."""
        return sum(stage.waiting for stage in self.stages) / len(self.stages)

    @property
    def exposed_share(self) -> float:
        """Share of the step in which a rank does nothing but send and receive, on average."""
        return sum(stage.exposed for stage in self.stages) / len(self.stages)

    @property
    def busiest_rank(self) -> int:
        """The world rank that waits least."""
        return int(np.argmax(np.add(self.ranks[COMPUTE], self.ranks[EXPOSED])))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": 1,
            "run": self.run,
            "hardware": self.hardware,
            "num_ranks": self.num_ranks,
            "layout": self.layout,
            "settings": self.settings,
            "step_seconds": self.step_seconds,
            "planned_seconds": self.planned_seconds,
            "bubble_share": self.bubble_share,
            "waiting_share": self.waiting_share,
            "exposed_share": self.exposed_share,
            "busiest_rank": self.busiest_rank,
            "phases": [vars(phase) for phase in self.phases],
            "stages": [vars(stage) for stage in self.stages],
            "ranks": self.ranks,
            "critical_path": {
                "words": self.path_words,
                "parts": [{"kind": kind, "phase": phase, "seconds": seconds} for kind, phase, seconds in self.path],
            },
        }


def summed_up(step: Step, *, settings: dict[str, Any], planned_seconds: float) -> Simulation:
    """Sum a simulated step up.

    Args:
        step: the step.
        settings: what made ranks differ, as they are to be reported.
        planned_seconds: the planner's closed form.
    """
    timeline, layout = step.timeline, step.layout
    path = critical_path(timeline)
    on_path: dict[tuple[str, str], float] = defaultdict(float)
    for segment in path:
        on_path[segment.kind, segment.phase] += segment.picoseconds / _PS_PER_SECOND
    spent = {kind: timeline.spent(kind) for kind in KINDS}
    zero = np.zeros((timeline.num_stages, timeline.ranks_per_stage), dtype=np.int64)
    totals = {kind: sum(spent[kind].values(), zero) for kind in KINDS}
    # Who is done earlier than the last rank waits for it: the next step begins with all of them.
    totals[BUBBLE] = timeline.end - totals[COMPUTE] - totals[EXPOSED] - totals[WAITING]
    ranks = {kind: total / _PS_PER_SECOND for kind, total in totals.items()}
    return Simulation(
        run=layout.run.name,
        hardware=step.hardware.label,
        num_ranks=layout.grid.world,
        layout=layout.grid.sizes | {"vpp": layout.run.parallel.vpp, "micro_batches": layout.batch.num_micro_batches},
        settings=settings,
        step_seconds=timeline.end / _PS_PER_SECOND,
        planned_seconds=planned_seconds,
        phases=_phases(spent),
        stages=[_stage(step, stage, ranks) for stage in range(timeline.num_stages)],
        ranks={kind: seconds.reshape(-1).tolist() for kind, seconds in ranks.items()},
        path=sorted(((*key, seconds) for key, seconds in on_path.items()), key=lambda part: -part[2]),
        path_words=path_words(path),
    )


def _phases(spent: dict[str, dict[str, np.ndarray]]) -> list[PhaseSeconds]:
    names = dict.fromkeys(phase for kind in KINDS for phase in spent[kind])
    found = [
        PhaseSeconds(
            phase=phase,
            **{kind: float(spent[kind][phase].mean()) / _PS_PER_SECOND for kind in KINDS if phase in spent[kind]},
        )
        for phase in names
    ]
    return sorted(found, key=lambda phase: -phase.total)


def _stage(step: Step, stage: int, ranks: dict[str, np.ndarray]) -> StageSummary:
    seconds = step.timeline.end / _PS_PER_SECOND
    shares = {
        kind: float(ranks[kind][stage].mean()) / seconds if seconds else 0.0
        for kind in (COMPUTE, EXPOSED, WAITING, BUBBLE)
    }
    topology: Topology = step.topology
    inside, across = step.sent_bytes[stage] / _BYTES_PER_GB
    entries = step.entries.get(stage)
    return StageSummary(
        stage=stage,
        **shares,
        inside_utilisation=_used(inside, topology.inside.gb_per_s, seconds),
        across_utilisation=_used(across, topology.across_gb_per_s, seconds),
        entries_max_over_mean=1.0 if entries is None or not entries.any() else float(entries.max() / entries.mean()),
    )


def _used(gigabytes: float, gb_per_s: float, seconds: float) -> float:
    return gigabytes / (gb_per_s * seconds) if seconds else 0.0
