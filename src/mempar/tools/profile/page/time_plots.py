"""Where time goes: by phase and layer, by rank, and how much of communication ranks wait for."""

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from mempar.tools.page.axes import legend_above, name_bars
from mempar.tools.page.plot import Plot, milliseconds, share, short
from mempar.tools.page.svg import GRID, SURFACE
from mempar.tools.profile.page.phases import FAMILIES, Family, family_of, in_order
from mempar.tools.profile.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Pixels of a bar with its gap, and of all that is around bars.
_BAR, _AROUND = 18.0, 88.0
# Of the first memory layer and of the last one, dark to light: readable without colour, too.
_FIRST_LAYER, _LAST_LAYER = (11, 85, 159), (182, 212, 233)
_OUTSIDE = "#A3A3A3"
_MOST_RANKS, _MOST_NAMED = 32, 8
# A rank is called the slowest when its computation exceeds the median's by so much.
_NOTEWORTHY = 1.02


def time_by_phase(report: Report) -> Plot:
    """Draw the mean time of each phase, stacked by layer."""
    name, calls = "time-by-phase", report.run.world_size * max(1, report.run.steps)
    times: defaultdict[str, defaultdict[int, float]] = defaultdict(_zeros)
    for row in report.rows:
        times[row.phase][row.layer] += row.microseconds / calls
    if not times:
        return Plot(name=name, title="No phase was marked: there is no time to show.")
    phases = in_order(set(times))
    totals = {phase: sum(times[phase].values()) for phase in phases}
    longest, total = max(phases, key=totals.__getitem__), sum(totals.values())
    # What is outside of layers last.
    layers = sorted({layer for of in times.values() for layer in of}, key=lambda layer: (layer < 0, layer))
    colours = layer_colours(layers)
    labels = _layer_names(layers)

    def paint(axes: "Axes") -> None:
        starts = dict.fromkeys(phases, 0.0)
        for layer in layers:
            widths = [times[phase][layer] / 1e3 for phase in phases]
            axes.barh(
                range(len(phases)),
                widths,
                left=[starts[phase] for phase in phases],
                height=0.72,
                color=colours[layer],
                edgecolor=SURFACE,
                linewidth=0.5,
                label=labels[layer],
            )
            for phase, width in zip(phases, widths, strict=True):
                starts[phase] += width
        name_bars(axes, phases, "milliseconds a step, mean of ranks and steps")
        if len(layers) > 1:
            legend_above(axes, 4, narrow=True)

    return Plot(
        name=name,
        title=f"{short(longest)} takes longest: {milliseconds(totals[longest])} a step, "
        f"{share(totals[longest] / total) if total else '0%'} of the time in marked phases",
        note="Phases in the order of a step; computation without a mark is not among them.",
        paint=paint,
        height=_AROUND + _BAR * len(phases),
    )


def exposed_and_overlapped(report: Report) -> Plot:
    """Draw how much of the time of collectives ranks wait for, and how much they do not."""
    name, calls = "exposed-and-overlapped", report.run.world_size * max(1, report.run.steps)
    exposed: defaultdict[str, float] = defaultdict(float)
    overlapped: defaultdict[str, float] = defaultdict(float)
    for row in report.rows:
        if row.group:
            exposed[row.phase] += row.exposed_us / calls
            overlapped[row.phase] += row.overlapped_us / calls
    waited = sum(exposed.values())
    total = waited + sum(overlapped.values())
    if not total:
        return Plot(name=name, title="No rank communicated: there is nothing to wait for.")
    phases = in_order(set(exposed))

    def paint(axes: "Axes") -> None:
        waits, others = ([of[phase] / 1e3 for phase in phases] for of in (exposed, overlapped))
        places = range(len(phases))
        style: Any = {"height": 0.72, "edgecolor": SURFACE, "linewidth": 0.5}
        axes.barh(places, waits, color="#D55E00", label="exposed: the rank waits", **style)
        axes.barh(places, others, left=waits, color="#56B4E9", label="not waited for", **style)
        name_bars(axes, phases, "milliseconds a step, mean of ranks and steps")
        legend_above(axes, 2, narrow=True)

    return Plot(
        name=name,
        title=f"Ranks wait for {share(waited / total)} of their communication: "
        f"{milliseconds(waited)} of {milliseconds(total)} a step",
        note="Exposed is what a rank waits for. Whether it computes in the rest of a call's time is not known.",
        paint=paint,
        height=_AROUND + _BAR * len(phases),
    )


def time_by_rank(report: Report) -> Plot:
    """Draw what each rank does with a step, and name the one that others wait for."""
    name, ranks = "time-by-rank", range(report.run.world_size)
    step = report.run.seconds_per_step * 1e6
    times: dict[Family, defaultdict[int, float]] = {family: _zeros() for family in FAMILIES}
    waits = _zeros()
    for row in report.rows:
        # What is not waited for takes no time of its own.
        spent = (row.exposed_us if row.group else row.microseconds) / max(1, report.run.steps)
        times[family_of(row.phase)][row.rank] += spent
        waits[row.rank] += spent if row.group else 0.0
    if not report.rows or not step:
        return Plot(name=name, title="No rank marked anything: there is no time to show.")
    busy = {rank: max(0.0, step - waits[rank]) for rank in ranks}
    slowest, median = max(ranks, key=busy.__getitem__), statistics.median(busy.values())
    shown = sorted(sorted(ranks, key=busy.__getitem__, reverse=True)[:_MOST_RANKS])
    families = [family for family in FAMILIES if any(times[family].values())]

    def paint(axes: "Axes") -> None:
        starts = dict.fromkeys(shown, 0.0)
        style: Any = {"height": 0.72, "edgecolor": SURFACE, "linewidth": 0.5}
        for family in families:
            widths = [times[family][rank] / 1e3 for rank in shown]
            axes.barh(
                range(len(shown)), widths, left=list(starts.values()), color=family.colour, label=family.name, **style
            )
            starts = {rank: starts[rank] + width for rank, width in zip(shown, widths, strict=True)}
        rest = [max(0.0, step / 1e3 - starts[rank]) for rank in shown]
        axes.barh(range(len(shown)), rest, left=list(starts.values()), color=GRID, label="without a mark", **style)
        name_bars(axes, [f"rank {rank}" for rank in shown], "milliseconds of a step")
        if busy[slowest] > _NOTEWORTHY * median:
            axes.get_yticklabels()[shown.index(slowest)].set_fontweight("bold")
        legend_above(axes, 2, narrow=True)

    return Plot(
        name=name,
        title=_title_of_ranks(busy, slowest, median),
        note="Mean of the steps; of collectives, what the rank waits for. The slowest rank is the one that waits least."
        + (f" The {len(shown)} of {len(ranks)} ranks that wait least." if len(shown) < len(ranks) else ""),
        paint=paint,
        height=_AROUND + 58.0 + _BAR * len(shown),
    )


def _layer_names(layers: list[int]) -> dict[int, str]:
    """For the legend: of many layers some are named, the others' colours lie between."""
    named = layers[:: -(-len(layers) // _MOST_NAMED)]
    # Matplotlib leaves out what begins with an underscore.
    names = {layer: f"layer {layer}" if layer in named else "_" for layer in layers}
    return names | ({-1: "outside memory layers"} if -1 in layers else {})


def _zeros() -> defaultdict[int, float]:
    return defaultdict(float)


def _title_of_ranks(busy: dict[int, float], slowest: int, median: float) -> str:
    if len(busy) == 1:
        return f"One rank, which nobody waits for: a step takes {milliseconds(busy[slowest])}"
    if busy[slowest] <= _NOTEWORTHY * median:
        return f"No rank is slow: all are busy for {milliseconds(median)} of a step, to within 2%"
    return (
        f"Rank {slowest} is the slowest: busy for {milliseconds(busy[slowest])} of a step, the median rank for "
        f"{milliseconds(median)}"
    )


def layer_colours(layers: list[int]) -> dict[int, str]:
    """A colour for each layer, dark to light; grey for what is outside of layers."""
    inside = [layer for layer in layers if layer >= 0]
    colours = dict.fromkeys(layers, _OUTSIDE)
    for place, layer in enumerate(inside):
        along = place / max(1, len(inside) - 1)
        mixed = (round(a + (b - a) * along) for a, b in zip(_FIRST_LAYER, _LAST_LAYER, strict=True))
        colours[layer] = "#{:02x}{:02x}{:02x}".format(*mixed)
    return colours
