"""`mempar plan --simulate`: simulate one step of a layout, and write its trace."""

import math
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import Hardware
from mempar.runtime.slot_file import load_slots
from mempar.tools.plan.step_time import step_time
from mempar.tools.simulate.chrome_trace import write_trace
from mempar.tools.simulate.loads import Loads, ZipfLoads
from mempar.tools.simulate.replay import TraceLoads
from mempar.tools.simulate.result import Simulation, summed_up
from mempar.tools.simulate.step import Disturbance, Step

# Beyond it a head reads its K favourites and nothing else.
_MOST_SKEWED = 10.0
# Ranks of which the trace has every task: the first of so many stages.
_MOST_TRACED = 8


@dataclass(frozen=True, kw_only=True)
class SimulationRequest:
    """What was asked for: the arguments of `simulate_plan`, by their options' names."""

    zipf: float = 0.0
    replay: Path | None = None
    jitter: float = 0.0
    seed: int = 1
    trace: Path | None = None


def simulate_plan(
    layout: Layout,
    hardware: Hardware,
    *,
    zipf: float = 0.0,
    replay: Path | None = None,
    jitter: float = 0.0,
    seed: int = 1,
    trace: Path | None = None,
) -> Simulation:
    """Simulate one step.

    Args:
        layout: a run on some ranks.
        hardware: what each rank is.
        zipf: exponent of the law by which slots are read; 0 for even reads.
        replay: a file of recorded slots, or the directory of the run that recorded them: its newest set's first step.
        jitter: standard deviation of how long ranks compute, as a share.
        seed: of skew and jitter.
        trace: where to write what the first ranks of stages did, for chrome://tracing or ui.perfetto.dev.

    Raises:
        ConfigError: for settings that are out of range or exclude each other, recorded slots that do not fit the run,
            or a trace that cannot be written.
    """
    for name, value, most in (("--zipf", zipf, _MOST_SKEWED), ("--jitter", jitter, 1.0)):
        if not (math.isfinite(value) and 0 <= value <= most):
            raise ConfigError(f"{name} {value} must be a number from 0 to {most:g}; 0 turns it off.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; seeds are whole numbers from 0; use one of these.")
    loads = _loads(layout, zipf=zipf, replay=replay, seed=seed)
    grid = layout.grid
    watched = [stage * grid.stage_size for stage in range(min(grid.pp, _MOST_TRACED))] if trace is not None else []
    step = Step(layout, hardware, Disturbance(loads=loads, jitter=jitter, seed=seed), watched)
    if trace is not None:
        write_trace(trace, step.timeline.spans)
    settings = {"zipf": zipf, "replay": str(replay) if replay else "", "jitter": jitter, "seed": seed}
    return summed_up(step, settings=settings, planned_seconds=step_time(layout, hardware).seconds)


def _loads(layout: Layout, *, zipf: float, replay: Path | None, seed: int) -> Loads | None:
    """Where reads go; None where they fall evenly."""
    if not zipf and replay is None:
        return None
    given = f"--zipf {zipf:g}" if zipf else f"--replay {replay}"
    if zipf and replay is not None:
        raise ConfigError(
            f"--zipf {zipf:g} and --replay {replay} exclude each other: reads are drawn or replayed; drop one of them."
        )
    if not layout.run.memories:
        raise ConfigError(
            f"{given} with a run without memory layers, which reads no table; drop it, or take a recipe with a memory."
        )
    if replay is None:
        return ZipfLoads(layout, zipf, seed)
    return TraceLoads(layout, load_slots(replay, first_step_only=True))
