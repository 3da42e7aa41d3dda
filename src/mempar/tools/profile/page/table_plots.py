"""How evenly tables are read: over the shards, and over the rows of a shard."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from mempar.tools.page.axes import legend_above, series
from mempar.tools.page.bins import powers, range_label
from mempar.tools.page.plot import Plot, share, short
from mempar.tools.page.svg import MUTED
from mempar.tools.profile.report import Report, TableReads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 280.0
_NONE = "This run has no memory table: there are no reads to show."
# Reads beyond which a shard is called loaded more than others.
_NOTEWORTHY = 1.02


def shard_imbalance(report: Report) -> Plot:
    """Draw the reads that each shard serves, relative to the mean of its table on its pipeline stage."""
    name, tables = "shard-imbalance", _by_table(report)
    # Stages may have unequally many layers of a table: what differs between them says nothing of shards.
    served: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for shard in report.tables:
        served[shard.table, report.run.stage_of(shard.rank)].append(shard.rows_read)
    means = {place: sum(reads) / len(reads) for place, reads in served.items()}
    loads = {
        table: [
            (shard.rank, shard.rows_read / mean)
            for shard in shards
            if (mean := means[table, report.run.stage_of(shard.rank)])
        ]
        for table, shards in tables.items()
    }
    loads = {table: of for table, of in loads.items() if of}
    if not loads:
        return Plot(name=name, title=_NONE if not tables else "No row of a table was read.")
    if all(len(reads) == 1 for reads in served.values()):
        return Plot(name=name, title="Each table lies whole on one rank: there are no shards to compare.")
    most, rank, busiest = max((load, rank, table) for table, of in loads.items() for rank, load in of)

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        axes.axhline(1.0, color=MUTED, linewidth=1.2, linestyle="--")
        for (table, of), (colour, marker) in zip(loads.items(), series(len(loads)), strict=True):
            ranks, heights = zip(*of, strict=True)
            axes.vlines(ranks, 1.0, heights, color=colour, linewidth=1.2)
            axes.plot(ranks, heights, marker, color=colour, markersize=7, label=short(table))
        furthest = max(0.1, 1.25 * max(abs(load - 1) for of in loads.values() for _, load in of))
        axes.set_ylim(max(-0.05, 1 - furthest), 1 + furthest)
        axes.set_xlim(-0.6, report.run.world_size - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("rank")
        axes.set_ylabel("reads served, mean shard = 1")
        axes.grid(visible=False, axis="x")
        if len(loads) > 1:
            legend_above(axes, 3)

    if most < _NOTEWORTHY:
        title = "Shards serve equally many reads, to within 2%"
    else:
        title = f"Rank {rank} serves most: {most:.2f} times the reads of the mean shard of {short(busiest)}"
    return Plot(
        name=name,
        title=title,
        note="Reads that other ranks and its own tokens asked of a shard, all measured steps together; the mean is "
        "that of the shards on the same pipeline stage.",
        paint=paint,
        height=_HEIGHT,
    )


def row_skew(report: Report) -> Plot:
    """Draw how often rows are read: the share of rows for each number of reads."""
    name, tables = "row-skew", _by_table(report)
    if not tables:
        return Plot(name=name, title=_NONE)
    shares = {table: _row_shares(shards) for table, shards in tables.items()}
    bins = powers(max((b for of in shares.values() for b in of), default=1))

    def paint(axes: "Axes") -> None:
        width = 0.8 / len(shares)
        for place, ((table, of), (colour, _)) in enumerate(zip(shares.items(), series(len(shares)), strict=True)):
            offset = (place - (len(shares) - 1) / 2) * width
            places = [index + offset for index in range(len(bins))]
            axes.bar(places, [100 * of.get(b, 0.0) for b in bins], width=width * 0.92, color=colour, label=short(table))
        aslant: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(bins) > 8 else {}
        axes.set_xticks(range(len(bins)), [range_label(b) for b in bins], **aslant)
        axes.set_yscale("log")
        smallest = min((100 * part for of in shares.values() for part in of.values() if part > 0), default=1.0)
        axes.minorticks_off()
        axes.set_ylim(smallest / 3, 150)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel("reads of a row, all measured steps together")
        axes.set_ylabel("share of the rows")
        axes.grid(visible=False, axis="x")
        if len(shares) > 1:
            legend_above(axes, 3)

    reads = {table: sum(shard.rows_read for shard in shards) for table, shards in tables.items()}
    tops = {
        table: sum(shard.top_share * shard.rows_read for shard in shards) / reads[table]
        for table, shards in tables.items()
        if reads[table]
    }
    if not tops:
        return Plot(name=name, title="No row of a table was read.")
    steepest = max(tops, key=tops.__getitem__)
    return Plot(
        name=name,
        title=f"1% of the rows of {short(steepest)} get {share(tops[steepest])} of its reads; "
        f"{share(shares[steepest].get(0, 0.0))} of them are not read",
        note="The 1% that are read most, on each shard. Bars are the shares of rows by how often they are read.",
        paint=paint,
        height=_HEIGHT,
    )


def _by_table(report: Report) -> dict[str, list[TableReads]]:
    found: defaultdict[str, list[TableReads]] = defaultdict(list)
    for shard in sorted(report.tables, key=lambda each: (each.table, each.rank)):
        found[shard.table].append(shard)
    return dict(found)


def _row_shares(shards: list[TableReads]) -> dict[int, float]:
    """Share of all rows by the power of two that their reads reach; 0 for those that are not read."""
    rows = max(1, sum(shard.num_rows for shard in shards))
    counts: Counter[int] = Counter()
    for shard in shards:
        counts[0] += max(0, shard.num_rows - shard.unique_rows)
        for low, number in shard.histogram:
            counts[low] += number
    return {low: number / rows for low, number in counts.items()}
