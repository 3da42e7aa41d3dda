"""What an inspection has found: plain numbers, which become tables, a page, or JSON as they are.

Blocks and heads count from 0. A weight is what a head's softmax gives a slot. A text's weights add up to 1 for each
token, layer and head; a slot's share is what it has of all of them.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextFindings:
    """One text, whatever memory it reads.

    Attributes:
        name: for people.
        tokens: that were read.
        windows: in which they were read; each begins without what came before.
        left_out: what of the text was not read, in words; empty if nothing was.
        shown: the letters of each token of the first window.
    """

    name: str
    tokens: int
    windows: int
    left_out: str
    shown: list[str]


@dataclass(frozen=True, kw_only=True)
class HistoryFindings:
    """When the rows of a memory were read last, in training.

    Attributes:
        figures: `coverage`, `coverage_steps`, `dead_slots` and `dead_since_step`, as in metrics.jsonl.
        ages: steps since a row was read (0 is the last step), by powers of two, and how many rows; those that were
            never read are not among them.
    """

    figures: dict[str, float]
    ages: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class RowFindings:
    """Norms of the rows of a table.

    Attributes:
        table: its name.
        num_rows: S.
        rows: that were looked at.
        initial_rows: of them, those that hold their initial values, to the last number.
        zero_rows: those of zeros alone.
        not_finite_rows: those with a number that is none.
        smallest: norm of the rows that are neither.
        mean: of these norms.
        largest: of these norms.
        norms: the bounds of a bin, rows in it, and how many of these hold their initial values.
    """

    table: str
    num_rows: int
    rows: int
    initial_rows: int
    zero_rows: int
    not_finite_rows: int
    smallest: float
    mean: float
    largest: float
    norms: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class SlotFindings:
    """A slot that a text reads.

    Attributes:
        slot: its index.
        share: of the text's weight.
        reads: how often it is read.
        peaks: the largest weight that any head in any layer gives it, for each token of the first window.
    """

    slot: int
    share: float
    reads: int
    peaks: list[float]


@dataclass(frozen=True, kw_only=True)
class LayerFindings:
    """The lookups of one layer for the first window of a text.

    Attributes:
        block: of the layer.
        tokens: for each token its slots of most weight, summed over heads: `[slot, weight]`, most first.
        peaks: for each token the largest weight of each head.
    """

    block: int
    tokens: list[list[list[float]]]
    peaks: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ReadFindings:
    """What one text reads of one memory.

    Attributes:
        figures: `coverage`, `reads`, `busiest_slot_reads`, `busiest_percent_share`, `effective_slots_share` and
            `entropy/block_B/head_H`, as in metrics.jsonl, of this text instead of a step.
        histogram: numbers of reads, and how many slots were read so often; slots that were not read are not there.
        slots: those of most weight, most first.
        layers: lookups of the first window.
    """

    figures: dict[str, float]
    histogram: list[list[int]]
    slots: list[SlotFindings]
    layers: list[LayerFindings]


@dataclass(frozen=True, kw_only=True)
class HeadOverlap:
    """How alike two texts read in one head: 1 is alike, 0 has nothing in common.

    Attributes:
        block: of the layer.
        head: in it.
        jaccard: slots that both read over slots that either reads.
        cosine: of the weights that they give the slots.
    """

    block: int
    head: int
    jaccard: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class NearSlot:
    """A slot that one text reads and the other does not, and the nearest one that the other reads.

    Attributes:
        slot: that one text reads.
        share: of that text's weight.
        nearest: the slot of the other text.
        nearest_share: of the other text's weight.
        cosine: of the two value rows.
    """

    slot: int
    share: float
    nearest: int
    nearest_share: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class OverlapFindings:
    """What two texts read in common of one memory.

    Attributes:
        jaccard: over all layers and heads; see `HeadOverlap`.
        cosine: over all layers and heads.
        shared_slots: how many slots both read.
        shared_weight: for each text, the share of its weight that goes to them.
        heads: each head by itself.
        shared: of the slots that both read those of most weight: `[slot, share, share]`.
        nearest: for each text, its slots of most weight that the other does not read.
        candidates: for each text, how many of its slots were looked at as nearest ones.
        chance: for each text, about the cosine that the nearest of as many rows in random directions would have.
    """

    jaccard: float
    cosine: float
    shared_slots: int
    shared_weight: list[float]
    heads: list[HeadOverlap]
    shared: list[list[float]]
    nearest: list[list[NearSlot]]
    candidates: list[int]
    chance: list[float]


@dataclass(frozen=True, kw_only=True)
class MemoryFindings:
    """One memory.

    Attributes:
        name: of the memory.
        variant: memory, memory_plus or peer.
        num_slots: S.
        value_dim: D.
        heads: H.
        top_k: K.
        blocks: that read it.
        history: None where the checkpoint has none.
        rows: of each table; none unless asked for.
        reads: of each text.
        overlap: of two texts.
    """

    name: str
    variant: str
    num_slots: int
    value_dim: int
    heads: int
    top_k: int
    blocks: list[int]
    history: HistoryFindings | None
    rows: list[RowFindings]
    reads: list[ReadFindings]
    overlap: OverlapFindings | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that was found.

    Attributes:
        checkpoint: where it lies.
        run: name of the run.
        step: of the run.
        seed: of the run, from which initial values come.
        date: of the inspection.
        texts: that were read.
        memories: in their order in the model.
    """

    checkpoint: str
    run: str
    step: int
    seed: int
    date: str
    texts: list[TextFindings]
    memories: list[MemoryFindings]

    def as_json(self) -> dict[str, Any]:
        """The findings as plain JSON, by the names of the attributes."""
        return asdict(self)
