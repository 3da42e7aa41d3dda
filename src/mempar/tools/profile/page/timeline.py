"""One step as it went: a track for each rank and kind of phase, time from left to right."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mempar.marks import Span
from mempar.tools.page.plot import WHOLE, Plot, milliseconds
from mempar.tools.page.svg import GRID
from mempar.tools.profile.page.phases import FAMILIES, family_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_RANKS = 16
# Pixels of a track: many ranks have thin ones.
_TRACK, _THIN_TRACK, _FEW_RANKS, _AROUND = 12.0, 6.0, 4, 112.0


def timeline(spans: dict[int, list[Span]]) -> Plot:
    """Draw the spans of a step that took as long as half of them do."""
    name = "timeline"
    step = middle_step(spans)
    if step is None:
        return Plot(name=name, title="No span was recorded: there is no timeline to show.", wide=True)
    ranks = sorted(rank for rank, of in spans.items() if any(span.step == step for span in of))
    shown = ranks[:_MOST_RANKS]
    mine = {rank: [span for span in spans[rank] if span.step == step] for rank in shown}
    start = min(span.start_ns for of in mine.values() for span in of)
    end = max(span.end_ns for of in mine.values() for span in of)
    families = [f for f in FAMILIES if any(family_of(span.phase) is f for of in mine.values() for span in of)]
    track = _TRACK if len(shown) <= _FEW_RANKS else _THIN_TRACK

    def paint(axes: "Axes") -> None:
        for place, rank in enumerate(shown):
            top = place * (len(families) + 1)
            if place:
                axes.axhline(top - 1, color=GRID, linewidth=0.8)
            for lane, family in enumerate(families):
                bars = bars_of([span for span in mine[rank] if family_of(span.phase) is family], start, end)
                axes.broken_barh(bars, (top + lane - 0.46, 0.92), facecolors=family.colour, linewidth=0)
        middles = [place * (len(families) + 1) + (len(families) - 1) / 2 for place in range(len(shown))]
        axes.set_yticks(middles, [f"rank {rank}" for rank in shown])
        axes.set_ylim(len(shown) * (len(families) + 1) - 1, -1)
        axes.set_xlim(0, max(1e-6, (end - start) / 1e6))
        axes.set_xlabel("milliseconds since the first mark of the step")
        axes.grid(visible=False, axis="y")
        for family in families:
            axes.plot([], [], "s", color=family.colour, markersize=8, label=family.name)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.2)

    return Plot(
        name=name,
        title=f"One step as it went: step {step}, {milliseconds((end - start) / 1e3)} from its first mark to its last",
        note="A track for each kind of phase on every rank; empty stretches are computation without a mark, or idle."
        + (f" The first {len(shown)} of {len(ranks)} ranks; the trace has all." if len(shown) < len(ranks) else ""),
        paint=paint,
        height=_AROUND + track * len(shown) * (len(families) + 1),
        wide=True,
    )


def middle_step(spans: dict[int, list[Span]]) -> int | None:
    """The step whose time, from the first mark on any rank to the last, is the median; None without spans."""
    first: defaultdict[int, list[int]] = defaultdict(list)
    last: defaultdict[int, list[int]] = defaultdict(list)
    for of in spans.values():
        for span in of:
            first[span.step].append(span.start_ns)
            last[span.step].append(span.end_ns)
    ordered = sorted(first, key=lambda step: (max(last[step]) - min(first[step]), step))
    return ordered[len(ordered) // 2] if ordered else None


def bars_of(spans: Sequence[Span], start: int, end: int) -> list[tuple[float, float]]:
    """Begin and width of bars in milliseconds, as far apart and as wide as can be seen.

    Args:
        spans: of one track.
        start: of the plot, in nanoseconds.
        end: of the plot, in nanoseconds.
    """
    seen = max(1.0, (end - start) / WHOLE / 4)
    bars: list[list[float]] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        if bars and span.start_ns - bars[-1][1] < seen:
            bars[-1][1] = max(bars[-1][1], span.end_ns)
        else:
            bars.append([span.start_ns, max(span.end_ns, span.start_ns + seen)])
    return [((first - start) / 1e6, (last - first) / 1e6) for first, last in bars]
