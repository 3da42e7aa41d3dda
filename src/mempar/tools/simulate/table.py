"""A simulated step on a terminal: its time, its stages, where the time goes, and the critical path."""

import io

from rich.console import Console
from rich.table import Table

from mempar.tools.simulate.result import PhaseSeconds, Simulation

# Phases that are shown, longest first; the rest is one line.
_MOST_PHASES = 12
# Stages that are shown: of more, the busiest ones.
_MOST_STAGES = 8


def simulation_table(simulation: Simulation) -> str:
    """Render a simulated step."""
    text = io.StringIO()
    console = Console(file=text, width=110, soft_wrap=True)
    console.print(_headline(simulation), highlight=False)
    console.print(_stages(simulation))
    console.print(_phases(simulation))
    console.print(simulation.path_words, highlight=False)
    return text.getvalue().rstrip()


def _headline(simulation: Simulation) -> str:
    planned = simulation.planned_seconds
    change = f" ({simulation.step_seconds / planned - 1:+.1%})" if planned else ""
    return (
        f"simulated step of {simulation.run} on {simulation.num_ranks} {simulation.hardware}: "
        f"{simulation.step_seconds:.4g} s; the closed form says {planned:.4g} s{change}; {_differences(simulation)}"
    )


def _differences(simulation: Simulation) -> str:
    """What makes ranks differ."""
    settings, said = simulation.settings, []
    if settings.get("replay"):
        said.append(f"reads replayed from {settings['replay']}")
    if settings.get("zipf"):
        said.append(f"reads skewed with exponent {settings['zipf']:g}")
    if settings.get("jitter"):
        said.append(f"computing jitters by {settings['jitter']:.1%}")
    return ", ".join(said) or "even reads, equal ranks"


def _stages(simulation: Simulation) -> Table:
    table = Table(title="share of the step, by stage", title_justify="left")
    table.add_column("stage", justify="right")
    for name in (
        "computes",
        "sends",
        "waits in stage",
        "waits for stages",
        "link in node",
        "to nodes",
        "max/mean rows",
    ):
        table.add_column(name, justify="right")
    stages = sorted(simulation.stages, key=lambda stage: stage.bubble + stage.waiting)[:_MOST_STAGES]
    for stage in sorted(stages, key=lambda stage: stage.stage):
        shares = (stage.compute, stage.exposed, stage.waiting, stage.bubble)
        links = (stage.inside_utilisation, stage.across_utilisation)
        cells = [f"{share:.1%}" for share in (*shares, *links)]
        table.add_row(str(stage.stage), *cells, f"{stage.entries_max_over_mean:.2f}")
    return table


def _phases(simulation: Simulation) -> Table:
    table = Table(title="milliseconds of a rank on average, by phase", title_justify="left")
    table.add_column("phase")
    for name in ("computes", "sends", "waits", "beside computing", "of the step"):
        table.add_column(name, justify="right")
    shown, rest = simulation.phases[:_MOST_PHASES], simulation.phases[_MOST_PHASES:]
    if rest:
        names = ("compute", "exposed", "waiting", "bubble", "overlapped")
        sums = {name: sum(getattr(phase, name) for phase in rest) for name in names}
        shown = [*shown, PhaseSeconds(phase=f"{len(rest)} others", **sums)]
    for phase in shown:
        seconds = (phase.compute, phase.exposed, phase.waiting + phase.bubble, phase.overlapped)
        share = phase.total / simulation.step_seconds if simulation.step_seconds else 0.0
        table.add_row(phase.phase, *(f"{1e3 * each:.4g}" if each else "-" for each in seconds), f"{share:.1%}")
    return table
