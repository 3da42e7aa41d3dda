"""What lies in a memory: when its slots were read last in training, and the norms of its rows."""

import math
from typing import TYPE_CHECKING

from mempar.tools.inspection.findings import MemoryFindings, RowFindings
from mempar.tools.page.axes import legend_above
from mempar.tools.page.bins import range_label
from mempar.tools.page.plot import Plot, share, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 280.0
_DATA, _LACKING, _INITIAL = "#0072B2", "#D55E00", "#A3A3A3"


def ages(memory: MemoryFindings) -> Plot:
    """Draw how many slots were read how long ago, and how many never."""
    name, history = f"{memory.name}-ages", memory.history
    if history is None:
        return Plot(name=name, title=f"{short(memory.name)}: there is no history of its rows to show.")
    dead, since = int(history.figures["dead_slots"]), int(history.figures["dead_since_step"])
    bins = [*history.ages, [-1, dead]]
    labels = [*(range_label(low) for low, _ in history.ages), "never" if not since else f"not since\nstep {since}"]

    def paint(axes: "Axes") -> None:
        colours = [_DATA] * len(history.ages) + [_LACKING]
        axes.bar(range(len(bins)), [100 * number / memory.num_slots for _, number in bins], color=colours, width=0.8)
        slant = 45 if len(bins) > 8 else 0
        axes.set_xticks(range(len(bins)), labels, rotation=slant, ha="right" if slant else "center")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel("steps since a slot was read last")
        axes.set_ylabel("share of the slots")
        axes.grid(visible=False, axis="x")

    when = f" since step {since}" if since else ""
    title = (
        f"{share(dead / memory.num_slots)} of the slots of {short(memory.name)} are dead: never read in training{when}"
        if dead
        else f"No slot of {short(memory.name)} is dead: all were read in training{when}"
    )
    window, coverage = int(history.figures["coverage_steps"]), history.figures["coverage"]
    return Plot(
        name=name,
        title=title,
        note=f"{dead:,} of {memory.num_slots:,} slots; {coverage:.1%} were read in the last {window} steps.",
        paint=paint,
        height=_HEIGHT,
    )


def norms(rows: RowFindings, seed: int) -> Plot:
    """Draw how many rows have which norm, those at their initial values apart."""
    name = f"{rows.table.replace('.', '-')}-norms"
    if not rows.norms:
        return Plot(name=name, title=f"{short(rows.table)}: no row has a norm to show.")

    def paint(axes: "Axes") -> None:
        lows = [math.log2(low) for low, _, _, _ in rows.norms]
        widths = [math.log2(high) - low for (_, high, _, _), low in zip(rows.norms, lows, strict=True)]
        initial = [each[3] for each in rows.norms]
        changed = [each[2] - each[3] for each in rows.norms]
        axes.bar(lows, initial, widths, align="edge", color=_INITIAL, label="at their initial values")
        axes.bar(lows, changed, widths, bottom=initial, align="edge", color=_DATA, label="changed")
        axes.xaxis.set_major_formatter(lambda value, _: f"{2**value:.3g}")
        axes.set_xlabel("norm of a row")
        axes.set_ylabel("rows")
        axes.grid(visible=False, axis="x")
        legend_above(axes, 2)

    looked = f"{rows.rows:,} of {rows.num_rows:,} rows" if rows.rows < rows.num_rows else f"all {rows.rows:,} rows"
    others = f" {rows.zero_rows:,} are zero." if rows.zero_rows else ""
    others += f" {rows.not_finite_rows:,} have numbers that are not finite." if rows.not_finite_rows else ""
    return Plot(
        name=name,
        title=f"{share(rows.initial_rows / rows.rows)} of the rows of {short(rows.table)} hold their initial values; "
        f"norms go from {rows.smallest:.3g} to {rows.largest:.3g}",
        note=f"{looked[0].upper()}{looked[1:]}; initial values are those of train.seed={seed}.{others}",
        paint=paint,
        height=_HEIGHT,
    )
