"""What texts read of a memory: how often slots, how sharply heads, what at which token, and what two have in common."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mempar.tools.inspection.findings import MemoryFindings, ReadFindings, TextFindings
from mempar.tools.page.axes import legend_above, name_rows, series
from mempar.tools.page.bins import by_powers, powers, range_label
from mempar.tools.page.heat import AROUND, ROW, paint_heat
from mempar.tools.page.plot import Plot, share, short
from mempar.tools.page.svg import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Columns of a heat map: as many as can be told apart at the width of a page.
MOST_COLUMNS = 96
_HEIGHT, _DOTS, _AROUND_DOTS = 280.0, 17.0, 88.0
# CSS pixels of a letter that stands on its side.
_LETTER = 5.5


def slot_reads(memory: MemoryFindings, texts: Sequence[TextFindings]) -> Plot:
    """Draw how many slots are read how often."""
    shares = [_shares(reads, memory.num_slots) for reads in memory.reads]
    bins = powers(max(low for of_text in shares for low in of_text))

    def paint(axes: "Axes") -> None:
        width = 0.8 / len(shares)
        for place, (text, of_text, (colour, _)) in enumerate(zip(texts, shares, series(len(shares)), strict=True)):
            offset = (place - (len(shares) - 1) / 2) * width
            heights = [100 * of_text.get(low, 0.0) for low in bins]
            places = [index + offset for index in range(len(bins))]
            axes.bar(places, heights, width=width * 0.92, color=colour, label=short(text.name))
        aslant: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(bins) > 8 else {}
        axes.set_xticks(range(len(bins)), [range_label(low) for low in bins], **aslant)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_ylim(min(100 * part for of in shares for part in of.values() if part) / 3, 150)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel("reads of a slot, by all tokens, heads and layers")
        axes.set_ylabel("share of the slots")
        axes.grid(visible=False, axis="x")
        legend_above(axes, 2, narrow=True)

    figures = memory.reads[0].figures
    return Plot(
        name=f"{memory.name}-reads",
        title=f"{short(texts[0].name)} reads {share(figures['coverage'])} of the slots of {short(memory.name)}; the "
        f"busiest 1% of all get {share(figures['busiest_percent_share'])} of its reads",
        note=" ".join(f"{short(text.name)}: {text.tokens:,} tokens." for text in texts),
        paint=paint,
        height=_HEIGHT,
    )


def entropies(memory: MemoryFindings, texts: Sequence[TextFindings]) -> Plot:
    """Draw the entropy of the weights of each head in each layer."""
    heads = [(block, head) for block in memory.blocks for head in range(memory.heads)]
    values = [[reads.figures[f"entropy/block_{b}/head_{h}"] for b, h in heads] for reads in memory.reads]

    def paint(axes: "Axes") -> None:
        axes.axvline(math.log(memory.top_k), color=MUTED, linewidth=1.2, linestyle="--")
        for text, of_text, (colour, marker) in zip(texts, values, series(len(values)), strict=True):
            axes.plot(of_text, range(len(heads)), marker, color=colour, markersize=7, label=short(text.name))
        name_rows(
            axes, [f"block {block}, head {head}" for block, head in heads], "mean entropy of a head's weights, nats"
        )
        axes.set_xlim(0.95 * min(map(min, values)), 1.02 * math.log(memory.top_k) + 0.01)
        legend_above(axes, 2, narrow=True)

    sharpest, flattest = min(values[0]), max(values[0])
    return Plot(
        name=f"{memory.name}-entropies",
        title=f"Heads of {short(memory.name)} weigh their {memory.top_k} slots as if they were "
        f"{math.exp(sharpest):.1f} (the sharpest) to {math.exp(flattest):.1f} (the flattest)",
        note="The dashed line is where all weights of a head are equal.",
        paint=paint,
        height=_AROUND_DOTS + _DOTS * len(heads),
    )


def heads_map(memory: MemoryFindings, text: TextFindings, reads: ReadFindings, place: int) -> Plot:
    """Draw how sharply each head reads at each token."""
    rows = [f"block {layer.block}, head {head}" for layer in reads.layers for head in range(memory.heads)]
    peaks = [
        [of_token[head] for of_token in layer.peaks[:MOST_COLUMNS]]
        for layer in reads.layers
        for head in range(memory.heads)
    ]
    mean = sum(map(sum, peaks)) / sum(map(len, peaks))
    return _map(
        f"{memory.name}-heads-{place}",
        f"{short(text.name)}, token by token: in a head of {short(memory.name)} the slot of most weight has {mean:.2f} "
        "on average",
        text,
        rows,
        peaks,
        "largest weight of a head",
    )


def slots_map(memory: MemoryFindings, text: TextFindings, reads: ReadFindings, place: int) -> Plot:
    """Draw at which tokens the slots of most weight are read."""
    peaks = [slot.peaks[:MOST_COLUMNS] for slot in reads.slots]
    total = sum(slot.share for slot in reads.slots)
    return _map(
        f"{memory.name}-slots-{place}",
        f"{short(text.name)}: slot {reads.slots[0].slot} has most weight, {share(reads.slots[0].share)} of all; the "
        f"{len(reads.slots)} slots shown have {share(total)}",
        text,
        [f"slot {slot.slot}" for slot in reads.slots],
        peaks,
        "largest weight that any head in any layer gives the slot",
    )


def overlap_heads(memory: MemoryFindings, texts: Sequence[TextFindings]) -> Plot:
    """Draw how alike two texts read, head by head."""
    found = memory.overlap
    assert found is not None
    names = [f"block {each.block}, head {each.head}" for each in found.heads]

    def paint(axes: "Axes") -> None:
        kinds = (("Jaccard: slots that both read", "jaccard"), ("cosine of the weights", "cosine"))
        for (label, kind), (colour, marker) in zip(kinds, series(2), strict=True):
            values = [getattr(each, kind) for each in found.heads]
            axes.plot(values, range(len(names)), marker, color=colour, markersize=7, label=label)
        name_rows(axes, names, "overlap of the two texts' reads")
        axes.set_xlim(-0.03, 1.03)
        legend_above(axes, 2, narrow=True)

    return Plot(
        name=f"{memory.name}-overlap",
        title=f"Both texts read {found.shared_slots:,} slots of {short(memory.name)}, which have "
        f"{share(found.shared_weight[0])} and {share(found.shared_weight[1])} of their weight",
        note=f"Over all heads the Jaccard overlap is {found.jaccard:.2f}, the cosine {found.cosine:.2f}.",
        paint=paint,
        height=_AROUND_DOTS + _DOTS * len(names),
    )


def shared_slots(memory: MemoryFindings, texts: Sequence[TextFindings]) -> Plot:
    """Draw the slots that both texts read."""
    found, name = memory.overlap, f"{memory.name}-shared"
    assert found is not None
    if not found.shared:
        return Plot(name=name, title=f"The two texts have no slot of {short(memory.name)} in common.")
    slots = [f"slot {int(slot)}" for slot, _, _ in found.shared]

    def paint(axes: "Axes") -> None:
        shares = [[100 * each[place] for each in found.shared] for place in (1, 2)]
        axes.hlines(range(len(slots)), shares[0], shares[1], color=MUTED, linewidth=1.2)
        for text, of_text, (colour, marker) in zip(texts, shares, series(2), strict=True):
            axes.plot(of_text, range(len(slots)), marker, color=colour, markersize=7, label=short(text.name))
        name_rows(axes, slots, "share of the text's weight")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        legend_above(axes, 2, narrow=True)

    first = found.shared[0]
    return Plot(
        name=name,
        title=f"Slot {int(first[0])} is what both read most: {share(first[1])} and {share(first[2])} of their weight",
        note="Slots that both texts read, by the lesser of their two shares.",
        paint=paint,
        height=_AROUND_DOTS + _DOTS * len(slots),
    )


def _map(name: str, title: str, text: TextFindings, rows: list[str], values: list[list[float]], quantity: str) -> Plot:
    tokens = [short(token) for token in text.shown[:MOST_COLUMNS]]

    def paint(axes: "Axes") -> None:
        paint_heat(axes, values, rows, tokens, quantity)

    left = f"The first {len(tokens)} of {text.tokens:,} tokens. " if len(tokens) < text.tokens else ""
    return Plot(
        name=name,
        title=title,
        note=f"{left}Tokens from left to right; the stronger the colour, the more.",
        paint=paint,
        height=AROUND + ROW * len(rows) + _LETTER * max(map(len, tokens)),
        wide=True,
    )


def _shares(reads: ReadFindings, num_slots: int) -> dict[int, float]:
    """Share of all slots by the power of two that their reads reach; 0 for those that are not read."""
    number = sum(slots for _, slots in reads.histogram)
    binned = by_powers([(0, num_slots - number), *((count, slots) for count, slots in reads.histogram)])
    return {low: slots / num_slots for low, slots in binned.items()}
