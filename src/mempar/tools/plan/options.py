"""The options of `mempar plan`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mempar.errors import ConfigError

if TYPE_CHECKING:
    from mempar.tools.simulate.command import SimulationRequest

# Plans that are shown unless one asks for more.
_TOP = 5
# What a simulated step takes beside the plan.
Zipf = Annotated[float | None, typer.Option(metavar="A", help="Simulate reads skewed as r^-A.", show_default=False)]
Replay = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Simulate reads that a run recorded (train.trace_steps).", show_default=False),
]
Jitter = Annotated[
    float | None, typer.Option(metavar="X", help="Simulate ranks that differ by a share X.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Of skew and jitter.  \\[default: 1]", show_default=False)]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write what the first ranks did, for ui.perfetto.dev.", show_default=False),
]


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name, a YAML file, or module:function.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="How many.  \\[default: what the recipe is laid out for]", show_default=False)
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, or a description in YAML.  \\[default: the recipe's]")
    ] = "",
    top: Annotated[int | None, typer.Option(help="Plans to show.  \\[default: 5]", show_default=False)] = None,
    with_arithmetic: Annotated[bool, typer.Option("--explain", help="Show the arithmetic of the first plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plans and reasons as JSON.")] = False,
    measured: Annotated[
        bool, typer.Option("--measure", help="Measure this machine instead, and write a description for --hardware.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --measure: the YAML file to make.", show_default=False)] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate a step of the first plan, rank by rank.")
    ] = False,
    zipf: Zipf = None,
    replay: Replay = None,
    jitter: Jitter = None,
    seed: Seed = None,
    trace: Trace = None,
) -> None:
    """Rank the layouts of a run on some GPUs by predicted step time; say what does not fit, and why.

    Nothing is started and no GPU is needed: figures of the hardware are data with sources.
    """
    from mempar.tools.plan import command

    simulated = _simulated(simulate, zipf=zipf, replay=replay, jitter=jitter, seed=seed, trace=trace)
    if measured:
        others = {"--gpus": gpus is not None, "--hardware": hardware, "--top": top is not None}
        others |= {"--explain": with_arithmetic, "--json": as_json, "--simulate": simulate}
        command.describe_machine(recipe, out, [name for name, is_given in others.items() if is_given], typer.echo)
        return
    request = command.Request(
        recipe=recipe,
        assignments=tuple(assignments or ()),
        gpus=gpus,
        hardware=hardware,
        top=_TOP if top is None else top,
        with_arithmetic=with_arithmetic,
        as_json=as_json,
        out=out,
        simulated=simulated,
    )
    command.plan(request, typer.echo)


def _simulated(simulate: bool, **asked: Any) -> "SimulationRequest | None":
    """What is to be simulated, if anything."""
    from mempar.tools.simulate.command import SimulationRequest

    given = {name: value for name, value in asked.items() if value is not None}
    if given and not simulate:
        options = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{options} without --simulate: only a simulated step takes that; add --simulate or drop it.")
    return SimulationRequest(**given) if simulate else None
