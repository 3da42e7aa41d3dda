"""The page: what was looked at, the plots of each memory, and the slots of each token as tables."""

from html import escape

from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import to_mapping
from mempar.tools.inspection.findings import Inspection, MemoryFindings, ReadFindings, TextFindings
from mempar.tools.inspection.page import memory_plots, text_plots
from mempar.tools.inspection.report import (
    chance_line,
    history_line,
    memory_line,
    overlap_line,
    reads_line,
    rows_line,
    text_line,
)
from mempar.tools.page.document import render_document
from mempar.tools.page.picture import draw_picture
from mempar.tools.page.plot import Plot, share
from mempar.tools.page.tables import data_table, pairs_table, settings_folded, tiles

# Tokens in a table: more make a page slow, and inspection.json has them.
MOST_TOKENS = 1000


def render_page(found: Inspection, run: RunConfig) -> str:
    """Put the page together.

    Args:
        found: what it shows.
        run: that wrote the checkpoint.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    return render_document(
        title=_title(found),
        subtitle=f"{found.checkpoint}, looked at on {found.date}",
        head=f"{_figures(found)}{pairs_table(_facts(found), 'What was looked at')}{settings_folded(to_mapping(run))}",
        plots=_plots(found),
        sections="\n".join(_sections(found)),
    )


def draw(found: Inspection) -> bytes:
    """The plots as one PNG file.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    return draw_picture(_title(found), _plots(found))


def _title(found: Inspection) -> str:
    return f"Memories of {found.run}, step {found.step}"


def _plots(found: Inspection) -> list[Plot]:
    plots = []
    for memory in found.memories:
        plots.append(memory_plots.ages(memory))
        plots += [memory_plots.norms(rows, found.seed) for rows in memory.rows]
        if memory.reads:
            plots += [text_plots.slot_reads(memory, found.texts), text_plots.entropies(memory, found.texts)]
        if memory.overlap is not None:
            plots += [text_plots.overlap_heads(memory, found.texts), text_plots.shared_slots(memory, found.texts)]
        for place, (text, reads) in enumerate(zip(found.texts, memory.reads, strict=True)):
            plots += [
                text_plots.heads_map(memory, text, reads, place),
                text_plots.slots_map(memory, text, reads, place),
            ]
    return plots


def _figures(found: Inspection) -> str:
    figures = []
    for memory in found.memories:
        figures.append((f"{memory.num_slots:,}", f"slots of {memory.name}"))
        if memory.history is not None:
            figures.append((f"{int(memory.history.figures['dead_slots']):,}", "of them dead: never read in training"))
        for text, reads in zip(found.texts, memory.reads, strict=True):
            figures.append((share(reads.figures["coverage"]), f"of them read by {text.name}"))
        if memory.overlap is not None:
            figures.append((f"{memory.overlap.cosine:.2f}", "cosine of what the two texts read"))
    return tiles(figures)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    facts = [("run", f"{found.run}, step {found.step}"), ("checkpoint", found.checkpoint)]
    facts += [(f"text {place}", text_line(text)) for place, text in enumerate(found.texts, 1)]
    for memory in found.memories:
        facts.append((memory.name, memory_line(memory)))
        if memory.history is not None:
            facts.append(("its history", history_line(memory.history, memory.num_slots)))
        facts += [("its rows", rows_line(rows, found.seed)) for rows in memory.rows]
        facts += [
            (f"text {place} reads", reads_line(reads, memory.num_slots)) for place, reads in enumerate(memory.reads, 1)
        ]
        if memory.overlap is not None:
            facts.append(("both texts", overlap_line(memory.overlap)))
    return facts


def _sections(found: Inspection) -> list[str]:
    sections = []
    for memory in found.memories:
        for text, reads in zip(found.texts, memory.reads, strict=True):
            sections.append(_tokens(memory, text, reads))
        if memory.overlap is not None:
            sections += _near(memory, found.texts)
    return sections


def _tokens(memory: MemoryFindings, text: TextFindings, reads: ReadFindings) -> str:
    kept = text.shown[:MOST_TOKENS]
    rows = [
        [
            str(place),
            token,
            *(
                ", ".join(f"{int(slot)}:\N{NO-BREAK SPACE}{weight:.2f}" for slot, weight in layer.tokens[place])
                for layer in reads.layers
            ),
        ]
        for place, token in enumerate(kept)
    ]
    heads = ["", "token", *(f"block {layer.block}" for layer in reads.layers)]
    left = f" The first {len(kept):,} of {text.tokens:,} tokens." if len(kept) < text.tokens else ""
    note = f"The slots of most weight in each layer; weights are summed over its {memory.heads} heads.{left}"
    return _section(
        f"What each token of {text.name} reads of {memory.name}",
        note,
        f"<details><summary>{len(kept):,} tokens</summary>{data_table(heads, rows, 'Slots of tokens', numbers={0})}"
        "</details>",
    )


def _near(memory: MemoryFindings, texts: list[TextFindings]) -> list[str]:
    found = memory.overlap
    assert found is not None
    sections = []
    for place, slots in enumerate(found.nearest):
        one, other = texts[place], texts[1 - place]
        rows = [
            [str(each.slot), f"{each.share:.2%}", str(each.nearest), f"{each.nearest_share:.2%}", f"{each.cosine:.3f}"]
            for each in slots
        ]
        heads = ["slot", "its share", "nearest slot", "its share", "cosine"]
        note = f"By the cosine of value rows, {chance_line(found, 1 - place)}. Shares are of each text's own weight."
        name = f"Slots of {memory.name} that {one.name} alone reads, and the nearest that {other.name} reads"
        if rows:
            sections.append(_section(name, note, data_table(heads, rows, "Nearest slots", numbers=range(5))))
    return sections


def _section(name: str, note: str, table: str) -> str:
    return f'<section aria-label="{escape(name)}">\n<h2>{escape(name)}</h2>\n<p>{escape(note)}</p>\n{table}\n</section>'
