"""What `mempar plan` does: a recipe, GPUs and their figures in, ranked layouts out; nothing is started."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.hardware import GPUS, Hardware
from mempar.runtime.hardware_file import find_hardware, hardware_yaml
from mempar.runtime.overrides import override
from mempar.tools.plan.document import document
from mempar.tools.plan.explain import explain
from mempar.tools.plan.planner import plan_run
from mempar.tools.plan.report import report
from mempar.tools.simulate.command import SimulationRequest, simulate_plan
from mempar.tools.simulate.table import simulation_table

_NOT_SIMULATED = "nothing, and no trace is written: no layout fits, so there is no step to play"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        recipe: a recipe's name, a YAML file or module:function; None if there was none.
        assignments: overrides, KEY=VALUE.
        gpus: how many; None for what the recipe is laid out for.
        hardware: a name or a YAML file; empty for what the recipe names.
        top: plans wanted.
        with_arithmetic: whether to explain the first.
        as_json: whether to print JSON alone.
        out: what --measure would write to; has no meaning here.
        simulated: how to simulate a step of the first plan; None for not at all.
    """

    recipe: str | None
    assignments: Sequence[str] = ()
    gpus: int | None = None
    hardware: str = ""
    top: int = 5
    with_arithmetic: bool = False
    as_json: bool = False
    out: Path | None = None
    simulated: SimulationRequest | None = None


def plan(request: Request, say: Callable[[str], None]) -> None:
    """Plan a run and print what came of it.

    Raises:
        ConfigError: for a recipe, hardware or number of GPUs that is none, sizes that allow no layout at all, or what
            cannot be simulated.
    """
    if request.recipe is None:
        raise ConfigError("no recipe is given; a plan is one of a run; name it, see `mempar recipes`.")
    if request.out is not None:
        raise ConfigError("--out without --measure: plans are printed; redirect them, or add --measure.")
    if request.as_json and request.with_arithmetic:
        raise ConfigError("--explain with --json: the arithmetic is for reading, step_parts in JSON; drop one of them.")
    run = override(find_recipe(request.recipe), list(request.assignments))
    hardware = _hardware(request, run)
    gpus = run.num_gpus if request.gpus is None else request.gpus
    planned = plan_run(run, gpus, hardware, top=request.top)
    # What the user types again, overrides of their own first.
    recipe = [request.recipe, *request.assignments]
    plans, simulation = planned.found.plans, None
    if request.simulated is not None and plans:
        simulation = simulate_plan(plans[0].layout, hardware, **vars(request.simulated))
    if request.as_json:
        simulated: dict[str, Any] = {}
        if request.simulated is not None:
            simulated["simulation"] = simulation and simulation.as_dict()
        if request.simulated is not None and simulation is None:
            simulated["simulation_reason"] = _NOT_SIMULATED
        say(json.dumps(document(planned, recipe) | simulated, indent=1))
        return
    say(report(planned, recipe))
    if request.with_arithmetic and plans:
        say("\n" + explain(planned))
    if request.simulated is not None:
        say("\n" + (f"simulated: {_NOT_SIMULATED}" if simulation is None else simulation_table(simulation)))


def describe_machine(recipe: str | None, out: Path | None, others: Sequence[str], say: Callable[[str], None]) -> None:
    """Measure this machine and write its description as YAML, to a file or for reading.

    Args:
        recipe: must be None: a machine is measured for any run.
        out: the file to make; it must not be there.
        others: other options that were given; there must be none.
        say: prints.

    Raises:
        ConfigError: for a recipe, another option, or a file that cannot be made.
    """
    if recipe is not None or others:
        what = " ".join([*([f"the recipe {recipe}"] if recipe else []), *others])
        raise ConfigError(f"--measure with {what}: it measures the machine, for any run; drop one of them.")
    if out is not None and (out.exists() or out.suffix not in (".yaml", ".yml") or not out.parent.is_dir()):
        why = "is there already" if out.exists() else "has no directory" if not out.parent.is_dir() else "is no .yaml"
        raise ConfigError(f"--out {out} {why}; a description is a new YAML file; name another one.")
    # Imports torch once it measures.
    from mempar.tools.plan.measure import measure

    # For reading, the description alone is printed.
    text = hardware_yaml(measure(say if out else lambda _: None))
    if out is None:
        say(text.rstrip())
        return
    out.write_text(text)
    say(f"{out} describes this machine; plan for it with --hardware {out}")


def _hardware(request: Request, run: RunConfig) -> Hardware:
    if request.hardware:
        return find_hardware(request.hardware)
    if run.hardware.kind is None:
        raise ConfigError(
            f"{request.recipe} names no GPU, and --hardware is not there; a plan is for some hardware; give --hardware "
            f"{', '.join(GPUS)}, or a file that `mempar plan --measure --out FILE.yaml` wrote."
        )
    return run.hardware.kind
