"""What is sent: bytes predicted and measured, and how fast they go beside what the links carry."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from mempar.tools.page.axes import legend_above, name_rows, series
from mempar.tools.page.plot import Plot, byte_count, milliseconds, share, short
from mempar.tools.page.svg import INK, MUTED
from mempar.tools.profile.page.phases import family_of, in_order
from mempar.tools.profile.report import CeilingPoint, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW, _AROUND, _CURVES_HEIGHT = 21.0, 88.0, 280.0


def predicted_and_measured(report: Report) -> Plot:
    """Draw the bytes of each phase beside what the formulas say."""
    name, calls = "predicted-and-measured", report.run.world_size * max(1, report.run.steps)
    predicted: Counter[str] = Counter()
    measured: Counter[str] = Counter()
    equal = compared = 0
    for row in report.rows:
        if row.bytes_predicted is None or not (row.bytes_predicted or row.bytes_measured):
            continue
        compared += 1
        equal += row.bytes_predicted == row.bytes_measured
        predicted[row.phase] += row.bytes_predicted
        measured[row.phase] += row.bytes_measured
    if not compared:
        return Plot(name=name, title="No memory layer sent anything: there are no bytes to predict.")
    phases = in_order(set(predicted))

    def paint(axes: "Axes") -> None:
        places = range(len(phases))
        said, sent = ([of[phase] / calls for phase in phases] for of in (predicted, measured))
        axes.hlines(places, said, sent, color=MUTED)
        axes.plot(
            said,
            places,
            "o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.4,
            label="predicted",
        )
        axes.plot(
            [measured[phase] / calls for phase in phases],
            places,
            "o",
            markersize=5.5,
            color="#D55E00",
            label="measured",
        )
        name_rows(axes, phases, "bytes sent a step, mean of ranks and steps")
        _logarithmic(axes, bytes_label)
        legend_above(axes, 2)

    verdict = (
        f"Measured bytes are the predicted ones, to the byte, in all {compared} rows: "
        if equal == compared
        else f"Measured bytes differ from the predicted ones in {compared - equal} of {compared} rows: "
    )
    return Plot(
        name=name,
        title=f"{verdict}a rank sends {byte_count(measured.total() / calls)} a step",
        note="A dot inside its ring is a prediction that holds. What a rank keeps for itself is not counted.",
        paint=paint,
        height=_AROUND + _ROW * len(phases),
    )


def bandwidth_and_ceiling(report: Report) -> Plot:
    """Draw the bandwidth of each phase beside what its group's links gave to messages of that size."""
    name = "bandwidth-and-ceiling"
    reached, ceilings = bandwidths(report)
    if not reached:
        return Plot(name=name, title="No rank sent anything: there is no bandwidth to show.")
    phases = in_order(set(reached))
    shares = {phase: reached[phase] / ceilings[phase] for phase in phases if phase in ceilings}

    def paint(axes: "Axes") -> None:
        for place, phase in enumerate(phases):
            if phase in ceilings:
                axes.plot([reached[phase], ceilings[phase]], [place, place], color=MUTED, linewidth=1.2)
                axes.plot(ceilings[phase], place, "|", markersize=15, markeredgewidth=2.2, color=INK, zorder=3)
                right = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points"}
                axes.annotate(share(shares[phase]), (1.0, place), va="center", annotation_clip=False, **right)
            axes.plot(reached[phase], place, "o", markersize=8, color=family_of(phase).colour, zorder=4)
        # For the legend alone.
        axes.plot([], [], "o", markersize=8, color=family_of("values").colour, label="in the step")
        axes.plot(
            [],
            [],
            "|",
            markersize=12,
            markeredgewidth=2.2,
            color=INK,
            label="ceiling for messages of that size",
        )
        name_rows(axes, phases, "bus bandwidth of a rank, GB/s")
        _logarithmic(axes, plain_label)
        legend_above(axes, 2)

    if not shares:
        title = "Bandwidth of each phase; no ceiling was measured in this run"
    else:
        best = max(shares, key=shares.__getitem__)
        worst = min(shares, key=shares.__getitem__)
        title = f"{short(best)} reaches {share(shares[best])} of what the links carry" + (
            f", {short(worst)} {share(shares[worst])}" if worst != best else ""
        )
    return Plot(
        name=name,
        title=title,
        note="Percentages are of the ceiling. Time in a collective includes waiting for the rank that comes last.",
        paint=paint,
        height=_AROUND + _ROW * len(phases),
    )


def ceiling_by_size(report: Report) -> Plot:
    """Draw what the links of each group gave to messages of several sizes."""
    name = "ceiling-by-size"
    curves: defaultdict[tuple[str, str], list[CeilingPoint]] = defaultdict(list)
    for point in sorted(report.ceiling, key=lambda each: each.message_bytes):
        if min(point.message_bytes, point.gb_per_s) > 0:
            curves[point.group, point.collective].append(point)
    if not curves:
        return Plot(name=name, title="No ceiling was measured: no group of this run has two ranks.")

    def paint(axes: "Axes") -> None:
        for ((group, collective), points), (colour, marker) in zip(curves.items(), series(len(curves)), strict=True):
            label = f"{short(group)} {short(collective)}, {points[0].ranks} ranks"
            sizes, speeds = [point.message_bytes for point in points], [point.gb_per_s for point in points]
            axes.plot(sizes, speeds, marker=marker, color=colour, linewidth=1.8, markersize=6, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: plain_label(value))
        axes.set_xlabel("bytes of a rank's message")
        axes.set_ylabel("bus bandwidth of a rank, GB/s")
        _logarithmic(axes, bytes_label)
        legend_above(axes, 2)

    best = max((point for of in curves.values() for point in of), key=lambda point: point.gb_per_s)
    least = min((point for of in curves.values() for point in of), key=lambda point: point.latency_us)
    return Plot(
        name=name,
        title=f"The links carry up to {best.gb_per_s:.3g} GB/s a rank ({short(best.group)}, {short(best.collective)}); "
        f"the smallest message takes {milliseconds(least.latency_us)} at least",
        note="Plain collectives over the run's own groups, after its steps, with nothing else running.",
        paint=paint,
        height=_CURVES_HEIGHT,
    )


def bandwidths(report: Report) -> tuple[dict[str, float], dict[str, float]]:
    """Bus bandwidth of the phases that send, and the ceiling at the size of their messages.

    Returns:
        By phase, GB/s over all of its time, and GB/s of the ceiling where one was measured.
    """
    sent: defaultdict[str, float] = defaultdict(float)
    taken: defaultdict[str, float] = defaultdict(float)
    sizes: dict[str, list[tuple[int, float]]] = {}
    groups: dict[str, str] = {}
    for row in report.rows:
        if row.group and row.bytes_measured and row.microseconds:
            sent[row.phase] += row.bus_gb_per_s * row.microseconds
            taken[row.phase] += row.microseconds
            sizes.setdefault(row.phase, []).append((row.calls, row.bytes_measured / max(1, row.calls)))
            groups[row.phase] = row.group
    reached = {phase: sent[phase] / taken[phase] for phase in sent if sent[phase] > 0}
    ceilings = {}
    for phase in reached:
        mean = sum(calls * size for calls, size in sizes[phase]) / max(1, sum(calls for calls, _ in sizes[phase]))
        if found := ceiling_at(report.ceiling, groups[phase], collective_of(phase), mean):
            ceilings[phase] = found
    return reached, ceilings


def collective_of(phase: str) -> str:
    """The measured collective that a phase is held against: bus bandwidths of gathers and sums are alike."""
    kind, engine, _ = phase.partition("/")
    if not engine:
        return "all_to_all"
    return {"all_to_all": "all_to_all", "send": "send", "receive": "send"}.get(kind, "all_reduce")


def ceiling_at(points: list[CeilingPoint], group: str, collective: str, message_bytes: float) -> float | None:
    """Bus bandwidth of a group's links for a message, between the measured sizes on logarithmic scales.

    Args:
        points: that were measured.
        group: kind of group.
        collective: kind of collective.
        message_bytes: of a call.

    Returns:
        GB/s; None where nothing was measured. Below the smallest size latency is all, beyond the largest bandwidth.
    """
    known = sorted(
        (point.message_bytes, point.gb_per_s)
        for point in points
        if (point.group, point.collective) == (group, collective) and min(point.message_bytes, point.gb_per_s) > 0
    )
    if not known or message_bytes <= 0:
        return None
    if message_bytes <= known[0][0]:
        return known[0][1] * message_bytes / known[0][0]
    for (small, slow), (large, fast) in itertools.pairwise(known):
        if message_bytes <= large:
            place = math.log(message_bytes / small) / math.log(large / small)
            return slow * (fast / slow) ** place
    return known[-1][1]


def _logarithmic(axes: "Axes", label: Callable[[float], str]) -> None:
    """Powers of ten, two of them at least, with room at the ends: or a single value fills the axis."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = low / 1.5, high * 1.5
    if high / low < 100:
        middle = math.sqrt(low * high)
        low, high = middle / 10, middle * 10
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, _: label(value))
    axes.minorticks_off()


def bytes_label(value: float) -> str:
    """A power of ten of bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} B"


def plain_label(value: float) -> str:
    """A power of ten without an exponent, as far as it can be read."""
    return f"{value:.12f}".rstrip("0").rstrip(".") if 1e-5 < value < 1 else f"{value:g}"
