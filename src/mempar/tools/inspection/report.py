"""Findings for reading: tables of a terminal."""

import io
import itertools
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mempar.tools.inspection.findings import (
    HistoryFindings,
    Inspection,
    MemoryFindings,
    OverlapFindings,
    ReadFindings,
    RowFindings,
    TextFindings,
)
from mempar.tools.page.bins import range_label

_WIDTH = 150
_BAR = 30
# Bins of norms.
_NORMS = 12
# Tokens of a text that a terminal shows; the page and JSON have all of the first window.
MOST_TOKENS = 40
_SHADES = " ▁▂▃▄▅▆▇█"


def report(found: Inspection, top: int) -> str:
    """The findings as tables.

    Args:
        found: in a checkpoint.
        top: slots in each list.
    """
    parts: list[RenderableType] = [Text(f"{found.checkpoint}: {found.run}, step {found.step}", style="bold")]
    for memory in found.memories:
        parts += ["", Text(memory_line(memory), style="bold"), *_history(memory), *_rows(memory, found.seed)]
        for text, reads in zip(found.texts, memory.reads, strict=True):
            parts += ["", Text(text_line(text), style="bold"), *_reads(memory, text, reads, top)]
        if memory.overlap is not None:
            parts += ["", *_overlap(memory.overlap, found.texts, top)]
    text = io.StringIO()
    Console(file=text, width=_WIDTH, highlight=False).print(Group(*parts))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    # Tables end with an empty line, where another one may follow.
    return "\n".join(line for before, line in itertools.pairwise(["", *lines]) if before or line).rstrip()


def memory_line(memory: MemoryFindings) -> str:
    """A memory in a line."""
    blocks = ", ".join(map(str, memory.blocks))
    return (
        f"{memory.name}: {memory.variant}, {memory.num_slots:,} slots of {memory.value_dim} numbers; each token reads "
        f"{memory.heads} heads x {memory.top_k} slots in block{'s' if len(memory.blocks) > 1 else ''} {blocks}"
    )


def text_line(text: TextFindings) -> str:
    """A text in a line."""
    windows = f" in {text.windows} windows, each without what came before" if text.windows > 1 else ""
    left_out = f"; not read: {text.left_out}" if text.left_out else ""
    return f"{text.name}: {text.tokens:,} token{'s' if text.tokens != 1 else ''}{windows}{left_out}"


def history_line(history: HistoryFindings, num_slots: int) -> str:
    """What the history of rows says, in a line."""
    figures = history.figures
    dead, since = int(figures["dead_slots"]), int(figures["dead_since_step"])
    return (
        f"in training {figures['coverage']:.1%} of the slots were read in the last {int(figures['coverage_steps'])} "
        f"steps; {dead:,} ({dead / num_slots:.1%}) never{f' since step {since}' if since else ''}"
    )


def rows_line(rows: RowFindings, seed: int) -> str:
    """What the norms of rows say, in a line."""
    of_all = f"{rows.rows:,} of {rows.num_rows:,}" if rows.rows < rows.num_rows else f"all {rows.num_rows:,}"
    others = [
        f"{number:,} {what}"
        for number, what in ((rows.zero_rows, "are zero"), (rows.not_finite_rows, "have numbers that are not finite"))
        if number
    ]
    return (
        f"{rows.table}, {of_all} rows: {rows.initial_rows:,} ({rows.initial_rows / max(1, rows.rows):.1%}) hold their "
        f"initial values of train.seed={seed}; norms {rows.smallest:.3g} to {rows.largest:.3g}, mean {rows.mean:.3g}"
        + "".join(f"; {each}" for each in others)
    )


def reads_line(reads: ReadFindings, num_slots: int) -> str:
    """What a text reads, in a line."""
    figures = reads.figures
    return (
        f"{figures['coverage']:.2%} of the slots are read ({sum(slots for _, slots in reads.histogram):,} of "
        f"{num_slots:,}); the busiest 1% of all take {figures['busiest_percent_share']:.1%} of the "
        f"{int(figures['reads']):,} reads, the busiest slot {int(figures['busiest_slot_reads']):,}; as if "
        f"{figures['effective_slots_share']:.2%} of the slots were read equally often"
    )


def _history(memory: MemoryFindings) -> list[RenderableType]:
    if memory.history is None:
        return [Text("no history of its rows: the run did not watch it, or only weights were kept")]
    history, dead = memory.history, int(memory.history.figures["dead_slots"])
    rows = [(range_label(low), number) for low, number in history.ages]
    never = "never" if not history.figures["dead_since_step"] else "not since then"
    return [
        Text(history_line(history, memory.num_slots)),
        _bars("steps since a slot was read", "slots", [*rows, (never, dead)], memory.num_slots),
    ]


def _rows(memory: MemoryFindings, seed: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for rows in memory.rows:
        table = _table("norm of a row", "rows", "initial", "")
        bins = _fewer(rows.norms)
        most = max((number for _, _, number, _ in bins), default=1)
        for low, high, number, initial in bins:
            bar = "█" * round(_BAR * number / most) or "▏"
            table.add_row(f"{low:.3g} to {high:.3g}", f"{int(number):,}", f"{int(initial):,}", bar)
        parts += [Text(rows_line(rows, seed)), Padding(table, (0, 0, 0, 2))]
    return parts


def _fewer(bins: Sequence[Sequence[float]]) -> list[tuple[float, float, float, float]]:
    """Join neighbouring bins of norms until there are few."""
    together = -(-len(bins) // _NORMS)
    parts = [bins[start : start + together] for start in range(0, len(bins), max(1, together))]
    return [
        (part[0][0], part[-1][1], sum(number for _, _, number, _ in part), sum(initial for *_, initial in part))
        for part in parts
    ]


def _reads(memory: MemoryFindings, text: TextFindings, reads: ReadFindings, top: int) -> list[RenderableType]:
    return [
        Text(reads_line(reads, memory.num_slots)),
        Padding(_entropies(memory, reads), (0, 0, 0, 2)),
        Padding(_slots(text, reads, top), (0, 0, 0, 2)),
        Padding(_tokens(memory, text, reads), (0, 0, 0, 2)),
    ]


def _entropies(memory: MemoryFindings, reads: ReadFindings) -> Table:
    nats = math.log(memory.top_k)
    table = _table(f"entropy of {nats:.2f} nats", *(f"head {head}" for head in range(memory.heads)))
    for block in memory.blocks:
        figures = (reads.figures[f"entropy/block_{block}/head_{head}"] for head in range(memory.heads))
        table.add_row(f"block {block}", *(f"{figure:.2f}" for figure in figures))
    return table


def _slots(text: TextFindings, reads: ReadFindings, top: int) -> Table:
    table = _table("slot of most weight", "share", "reads", "most at")
    table.columns[-1].justify = "left"
    for slot in reads.slots[:top]:
        places = sorted(range(len(slot.peaks)), key=lambda place: -slot.peaks[place])[:3]
        most = [f"{text.shown[place]} ({place}) {_weight(slot.peaks[place])}" for place in places if slot.peaks[place]]
        table.add_row(str(slot.slot), f"{slot.share:.2%}", f"{slot.reads:,}", Text(", ".join(most)))
    return table


def _tokens(memory: MemoryFindings, text: TextFindings, reads: ReadFindings) -> Table:
    """The first tokens: of each layer how sharply its heads read, as bars, and the slots of most weight."""
    table = _table("", "token", *(f"block {layer.block}: heads, slots" for layer in reads.layers))
    for column in table.columns[1:]:
        column.justify = "left"
    number, most = len(text.shown), max(peak for layer in reads.layers for heads in layer.peaks for peak in heads)
    # What fits into a line.
    slots_a_layer = min(3, max(1, 9 // len(reads.layers)))
    for place in range(min(MOST_TOKENS, number)):
        cells = []
        for layer in reads.layers:
            bars = "".join(_shade(peak / most) for peak in layer.peaks[place])
            slots = "  ".join(f"{int(slot)} {_weight(weight)}" for slot, weight in layer.tokens[place][:slots_a_layer])
            cells.append(Text(f"{bars}  {slots}"))
        table.add_row(str(place), Text(text.shown[place]), *cells)
    table.caption = f"bars: the largest weight of each head, up to {most:.2f}; weights of slots are summed over heads"
    if number > MOST_TOKENS:
        table.caption += f"; the first {MOST_TOKENS} of {number} tokens, the page and --json have all"
    table.caption_justify = "left"
    return table


def _overlap(found: OverlapFindings, texts: Sequence[TextFindings], top: int) -> list[RenderableType]:
    shared = _table("slot that both read", "share of the first", "share of the second")
    for slot, one, other in found.shared[:top]:
        shared.add_row(str(int(slot)), f"{one:.2%}", f"{other:.2%}")
    heads = _table("overlap", *(f"head {head}" for head in range(1 + max(each.head for each in found.heads))))
    for block in dict.fromkeys(each.block for each in found.heads):
        of_block = [each for each in found.heads if each.block == block]
        heads.add_row(f"block {block}, Jaccard", *(f"{each.jaccard:.2f}" for each in of_block))
        heads.add_row(f"block {block}, cosine", *(f"{each.cosine:.2f}" for each in of_block))
    parts: list[RenderableType] = [
        Text(f"{texts[0].name} and {texts[1].name}", style="bold"),
        Text(overlap_line(found)),
        Padding(heads, (0, 0, 0, 2)),
        Padding(shared, (0, 0, 0, 2)),
    ]
    for place, slots in enumerate(found.nearest):
        first, second = ("first", "second") if place == 0 else ("second", "first")
        near = _table(f"slot of the {first} alone", "share", f"nearest of the {second}", "its share", "cosine of rows")
        for each in slots[:top]:
            near.add_row(
                str(each.slot),
                f"{each.share:.2%}",
                str(each.nearest),
                f"{each.nearest_share:.2%}",
                f"{each.cosine:.2f}",
            )
        near.caption, near.caption_justify = chance_line(found, 1 - place), "left"
        if slots:
            parts.append(Padding(near, (0, 0, 0, 2)))
    return parts


def chance_line(found: OverlapFindings, place: int) -> str:
    """What to hold the cosines of nearest slots against, those of one text being looked at."""
    return (
        f"among the {found.candidates[place]:,} slots of most weight; rows in random directions would come to about "
        f"{found.chance[place]:.2f}"
    )


def overlap_line(found: OverlapFindings) -> str:
    """What two texts have in common, in a line."""
    return (
        f"both read {found.shared_slots:,} slots, which have {found.shared_weight[0]:.1%} of the weight of the first, "
        f"{found.shared_weight[1]:.1%} of that of the second; Jaccard {found.jaccard:.2f}, cosine {found.cosine:.2f}"
    )


def _bars(name: str, what: str, rows: Sequence[tuple[str, int]], total: int) -> RenderableType:
    table = _table(name, what, "share", "")
    most = max([1, *(number for _, number in rows)])
    for label, number in rows:
        bar = "█" * round(_BAR * number / most) or ("▏" if number else "")
        table.add_row(label, f"{number:,}", f"{number / total:.1%}", bar)
    return Padding(table, (0, 0, 0, 2))


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place and head else "left", no_wrap=place == 0)
    return table


def _weight(weight: float) -> str:
    return f"{weight:.2f}".removeprefix("0")


def _shade(share: float) -> str:
    return _SHADES[min(len(_SHADES) - 1, max(1, round(share * (len(_SHADES) - 1))))]
