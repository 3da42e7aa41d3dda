"""Plans for reading: the ranking, the memory and the traffic of the best, and why other layouts are not there."""

import io
import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mempar.tools.estimate_table import estimate_table
from mempar.tools.plan.figures import figures_of
from mempar.tools.plan.planner import Planned
from mempar.tools.plan.search import Plan, all_reasons, gib
from mempar.tools.plan.settings import launch_options, settings_of
from mempar.tools.plan.traffic import traffic_of
from mempar.tools.recipe_list import layout_text, short

_WIDTH = 150
# Parts of a step that a row names, and reasons that are listed.
_PARTS, _REASONS = 3, 8


def report(planned: Planned, recipe: Sequence[str]) -> str:
    """The plans as tables.

    Args:
        planned: the plans.
        recipe: what the user called the run, overrides included.
    """
    if not planned.found.plans:
        lines = [*_nothing_fits(planned, shlex.join(recipe)), *_memory_note(planned), *_reasons(planned)]
        return "\n".join(lines)
    best = planned.found.plans[0]
    lines = [
        *_changes(planned),
        *_ranking(planned),
        _own(planned),
        _budget(planned, best),
        *_memory_note(planned),
        "",
        *estimate_table(best.estimate, planned.hardware).splitlines(),
        "",
        *_traffic(planned, best),
        *_reasons(planned),
        "",
        "to run the first: " + shlex.join(["mempar", "launch", *launch_arguments(planned, best, recipe)]),
    ]
    return "\n".join(lines)


def launch_arguments(planned: Planned, plan: Plan, recipe: Sequence[str]) -> list[str]:
    """What `mempar launch` takes to run a plan."""
    options = launch_options(planned.num_ranks, planned.hardware.gpus_per_node)
    return [*recipe, *settings_of(planned.given, plan.layout.run), *options]


def layout_of(plan: Plan) -> str:
    """A layout in a few words."""
    layout = plan.layout
    run = layout.run
    sizes = {name: getattr(layout.grid, name) for name in ("tp", "pp", "cp", "ep", "mp", "mp_rows", "mp_columns", "dp")}
    words = [layout_text({**sizes, "mp_hops": layout.grid.mp_hops})]
    if run.parallel.vpp > 1:
        words.append(f"vpp{run.parallel.vpp}")
    words.append(f"micro-batch {run.train.micro_batch_size}")
    if run.train.recompute != "none":
        words.append(f"recompute {run.train.recompute}")
    if any(len(placed.stages) > 1 for placed in layout.placement.memories.values()):
        words.append("tables copied on " + ", ".join(str(stage) for stage in layout.placement.table_stages))
    return ", ".join(words)


def _changes(planned: Planned) -> list[str]:
    return [*_changes_of_all(planned), *_changes_of_some(planned)]


def _changes_of_some(planned: Planned) -> list[str]:
    """What plans change each for itself, by what it is."""
    places: dict[str, list[str]] = {}
    for place, plan in enumerate(planned.found.plans, 1):
        for change in planned.changes_of(plan)[len(planned.changes) :]:
            places.setdefault(change, []).append(str(place))
    if not places:
        return []
    return [
        "a balance loss depends on the tokens that it is taken over at a time. These plans CHANGE THE TRAINING:",
        *(f"  {', '.join(numbers)}: {change}" for change, numbers in places.items()),
        "",
    ]


def _changes_of_all(planned: Planned) -> list[str]:
    if not planned.changes:
        return []
    enough = f"; as it is, it would fit on {planned.enough_gpus} of them" if planned.enough_gpus else ""
    return [
        f"the run as it is fits in no layout on {planned.num_ranks} {planned.hardware.label}{enough}. These plans "
        "CHANGE ITS TRAINING:",
        *(f"  {change}" for change in planned.changes),
        "",
    ]


def _ranking(planned: Planned) -> list[str]:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left",
        title=f"{planned.run.name} on {planned.num_ranks} {planned.hardware.label}, by predicted step",
    )  # fmt: skip
    table.add_column("", justify="right")
    table.add_column("layout")
    for heading in ("step s", "tokens/s/GPU", "MFU", "GiB a GPU", "of it"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what the step is made of")
    for place, plan in enumerate(planned.found.plans, 1):
        figures = figures_of(plan, planned.hardware)
        table.add_row(
            str(place),
            layout_of(plan),
            f"{plan.time.seconds:.4g}",
            f"{figures.tokens_per_second_per_gpu:.0f}",
            f"{figures.mfu:.1%}",
            gib(plan.memory_bytes),
            f"{figures.memory_share:.0%}",
            _made_of(plan),
        )
    return _rendered(table)


def _made_of(plan: Plan) -> str:
    """Compute, communication and waiting, and the largest parts of the second."""
    seconds, parts = plan.time.seconds, plan.time.by_sort
    words = [f"{name} {value / seconds:.0%}" for name, value in parts.items() if value > 0.005 * seconds]
    sent = sorted(plan.time.communication.items(), key=lambda part: -part[1])[:_PARTS]
    named = ", ".join(f"{name} {us / 1e4 / seconds:.0f}%" for name, us in sent if us > 5e3 * seconds)
    return ", ".join(words) + (f" ({named})" if named else "")


def _own(planned: Planned) -> str:
    if planned.own is None:
        return f"the layout that the recipe brings along is none here: {planned.own_reason}"
    if planned.own is planned.found.plans[0]:
        return "the first is the layout that the recipe brings along"
    seconds, best = planned.own.time.seconds, planned.found.plans[0].time.seconds
    barely = "" if planned.own.has_room(planned.hardware) else ", which fits barely: fragments may not"
    return (
        f"the layout that the recipe brings along ({layout_of(planned.own)}): {seconds:.4g} s, "
        f"{abs(seconds / best - 1):.1%} {'slower' if seconds >= best else 'faster'}, "
        f"{gib(planned.own.memory_bytes)} GiB{barely}"
    )


def _budget(planned: Planned, best: Plan) -> str:
    figures = figures_of(best, planned.hardware)
    return (
        f"{short(figures.tokens)} tokens in {best.layout.run.train.steps} steps: {figures.days:.1f} days, "
        f"{figures.gpu_hours:,.0f} GPU-hours with the first, without checkpoints, evaluation and failures"
    )


def _memory_note(planned: Planned) -> list[str]:
    return [planned.memory_note] if planned.memory_note else []


def _traffic(planned: Planned, best: Plan) -> list[str]:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title="what a rank sends in a step of the first"
    )
    table.add_column("collective")
    table.add_column("link")
    for heading in ("GB", "ms", "of the step"):
        table.add_column(heading, justify="right")
    for each in traffic_of(best.layout, planned.hardware, best.time):
        share = each.seconds / best.time.seconds
        table.add_row(each.name, each.link, f"{each.sent_bytes / 1e9:.3g}", f"{each.seconds * 1e3:.3g}", f"{share:.1%}")
    return _rendered(table) if table.row_count else ["nothing is sent: every rank works alone"]


def _reasons(planned: Planned) -> list[str]:
    found = planned.found
    reasons = list(all_reasons(found))
    lines = [
        f"looked at {found.num_looked:,} layouts; {sum(each.count for each in reasons):,} do not fit or are refused, "
        f"{found.num_slower:,} more cannot be faster"
    ]
    for each in reasons[:_REASONS]:
        lines.append(f"  {each.count:,} x {'the nearest ' if each.num_bytes else ''}{each.reason}")
    return lines


def _nothing_fits(planned: Planned, recipe: str) -> list[str]:
    if planned.nearest is None:
        return [f"nothing fits: {recipe} has no layout on {planned.num_ranks} {planned.hardware.label} that is allowed"]
    need, have = planned.nearest.worst.total, planned.hardware.memory_bytes
    lines = [
        f"nothing fits: {recipe} needs {gib(need)} GiB on each of {planned.num_ranks} {planned.hardware.label} in the "
        f"layout that needs least, {gib(need - have)} more than the {gib(have)} that one has",
        "what would help:",
    ]
    if planned.enough_gpus:
        lines.append(f"  {planned.enough_gpus} of these GPUs, with every setting as it is")
    return [*lines, *(f"  {advice}" for advice in planned.advice)]


def _rendered(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()] + [""]
