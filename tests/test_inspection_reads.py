"""Parts of `mempar inspect` by themselves: sums of reads, blocks of rows, norms, history, letters, overlaps, tables."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from made_up_inspection import made_up_inspection, reads_of
from mempar.dims import TableSlice
from mempar.errors import CheckpointError
from mempar.memory.config import MemoryConfig
from mempar.memory.initial import table_values
from mempar.recipes import find_recipe
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import TensorRecord
from mempar.runtime.data.encoders import ByteEncoder
from mempar.runtime.data.tokenizer import parse_spec
from mempar.tools.inspection.findings import HistoryFindings
from mempar.tools.inspection.history import read_history
from mempar.tools.inspection.overlap import chance_cosine, cosine, jaccard, nearest, overlap
from mempar.tools.inspection.page import memory_plots
from mempar.tools.inspection.page.document import render_page
from mempar.tools.inspection.page.text_plots import MOST_COLUMNS, heads_map
from mempar.tools.inspection.reads import SlotSums
from mempar.tools.inspection.report import MOST_TOKENS, report, text_line
from mempar.tools.inspection.row_blocks import row_blocks, rows_wanted
from mempar.tools.inspection.rows import read_rows, table_numbers
from mempar.tools.inspection.texts import letters, printable
from page_reader import HOSTILE, read_page


class MadeUpSource:
    """Tensors in memory, cut at given rows, where a checkpoint is expected."""

    def __init__(self, cuts: list[int], step: int = 0, about: dict[str, Any] | None = None, **tensors: Tensor) -> None:
        self.run = find_recipe("smoke")
        self.root, self.about = Path("made up"), about or {}
        self.manifest = SimpleNamespace(step=step)
        self.values = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.tensors = {
            name: TensorRecord(dtype=str(tensor.dtype)[6:], shape=tuple(tensor.shape), kind="weights", digest=0)
            for name, tensor in self.values.items()
        }
        self.read_rows = 0
        self._cuts = cuts

    def cuts(self, name: str) -> list[int]:
        return self._cuts

    def read(self, box: Box, target: Tensor) -> None:
        self.read_rows += box.sizes[0]
        target.copy_(self.values[box.name][box.offset[0] : box.offset[0] + box.sizes[0]])


def source_of(*args: Any, **kwargs: Any) -> Any:
    return MadeUpSource(*args, **kwargs)


def test_blocks_of_rows_lie_evenly_over_the_table_up_to_a_limit() -> None:
    source = source_of([0, 10, 20, 30, 40, 45], x=torch.arange(45.0)[:, None])
    counted: list[int] = []
    blocks = list(row_blocks(source, "x", counted.append))
    assert [first for first, _ in blocks] == [0, 10, 20, 30, 40] and sum(counted) == 45 == rows_wanted(source, "x")
    assert torch.cat([rows for _, rows in blocks]).flatten().tolist() == list(range(45))
    found = {first: rows.flatten().tolist() for first, rows in row_blocks(source, "x", counted.append, 12)}
    # Two of five blocks hold as many rows, six of each.
    assert found == {0: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 20: [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]}
    assert [rows_wanted(source, "x", limit) for limit in (1, 7, 44, 45, 999)] == [1, 7, 40, 45, 45]
    source.read_rows = 0
    list(row_blocks(source, "x", counted.append, 3))
    assert source.read_rows == 10


def test_rows_are_told_by_norm_and_initial_values() -> None:
    part = TableSlice(num_slots=40, value_dim=24, row_start=0, row_end=40, column_start=0, column_end=24)
    values = table_values(part, seed=1, dtype=torch.float32, device=torch.device("cpu"))
    values[3] = 0.0
    values[7, 20] += 1.0
    values[9] *= 2.0
    values[11, 23] = torch.nan
    values[12, 0] = torch.inf
    counted: list[int] = []
    found = read_rows(source_of([0, 13, 26, 40], memory__values=values), "memory.values", counted.append)
    assert (found.rows, found.zero_rows, found.not_finite_rows, found.initial_rows) == (40, 1, 2, 35)
    norms = values.double().norm(dim=1)
    norms = norms[norms.isfinite() & (norms > 0)]
    assert [found.smallest, found.mean, found.largest] == pytest.approx(
        [float(each) for each in (norms.min(), norms.mean(), norms.max())]
    )
    assert sum(number for _, _, number, _ in found.norms) == 37
    assert sum(initial for *_, initial in found.norms) == 35
    nothing = read_rows(source_of([0, 40], memory__values=torch.zeros_like(values)), "memory.values", counted.append)
    assert nothing.zero_rows == 40 and nothing.norms == [] and (nothing.smallest, nothing.mean) == (0.0, 0.0)
    assert "no row has a norm" in memory_plots.norms(nothing, 1).title


def test_tables_are_numbered_over_all_memories() -> None:
    two = SimpleNamespace(memories={"memory": MemoryConfig(variant="peer"), "memory1": MemoryConfig()})
    assert table_numbers(two) == {"memory.values": 0, "memory.down": 1, "memory1.values": 2}  # type: ignore[arg-type]


def history_of(last_read: list[int], since: Any = 4, step: int = 20) -> HistoryFindings | None:
    tensor = torch.zeros(128 * 128, dtype=torch.int32)
    tensor[: len(last_read)] = torch.tensor(last_read, dtype=torch.int32)
    about = {} if since is None else {"history_since": {"memory": since}}
    source = source_of([0, 5000, 128 * 128], step=step, about=about, memory__last_read=tensor)
    return read_history(source, "memory", lambda count: None)


def test_history_counts_from_where_it_begins() -> None:
    found = history_of([20, 20, 19, 12, 5])
    assert found is not None
    assert found.figures == {
        "coverage": 5 / 128**2,
        "coverage_steps": 16,
        "dead_slots": 128**2 - 5,
        "dead_since_step": 4,
    }
    assert found.ages == [[0, 2], [1, 1], [8, 2]]
    assert history_of([1], since=None) is None
    for since in (-1, 21, "4", True):
        with pytest.raises(CheckpointError, match="the history of memory"):
            history_of([20], since=since)


def test_sums_of_slots_are_joined_in_the_order_of_their_indices() -> None:
    one = SlotSums.of(np.array([[5, 2], [5, 9]]), np.array([[0.5, 0.25], [0.5, 0.75]]))
    assert (one.slots.tolist(), one.reads.tolist(), one.weight.tolist()) == ([2, 5, 9], [1, 2, 1], [0.25, 1.0, 0.75])
    both = SlotSums.joined([one, SlotSums.of(np.array([9, 1]), np.array([0.25, 0.25]))])
    assert both.slots.tolist() == [1, 2, 5, 9] and both.reads.tolist() == [1, 1, 2, 2]
    assert both.share.tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4])
    # Of equal weight the lowest slot comes first.
    assert both.slots[both.heaviest(3)].tolist() == [5, 9, 1]
    assert both.histogram() == [(1, 2), (2, 2)]


def test_windows_add_up() -> None:
    reads = reads_of([[[1, 2], [1, 3]], [[4, 2], [5, 3]]], [[[1, 2], [6, 7]]])
    found = reads.findings(3, 1)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert found.figures["entropy/block_3/head_1"] == pytest.approx(entropy)
    assert (found.figures["reads"], found.figures["coverage"]) == (12, 0.07)
    assert found.histogram == [[1, 4], [2, 1], [3, 2]]
    # The first window's tokens alone.
    assert found.layers[0].tokens == [[[1, 1.5]], [[4, 0.75]]]
    assert found.layers[0].peaks == [[0.75, 0.75], [0.75, 0.75]]
    most = found.slots[0]
    assert (most.slot, most.reads, most.share, most.peaks) == (1, 3, 2.25 / 6, [0.75, 0.0])


def test_overlaps_of_known_reads() -> None:
    one, other = reads_of([[[1, 2], [3, 4]]]), reads_of([[[2, 1], [5, 6]]])
    rows = torch.zeros(100, 3)
    rows[3], rows[4], rows[6] = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 1.0]), torch.tensor([0, 0, 2.0])
    found = overlap(one, other, lambda slots: rows[slots], 3, 5)
    assert [(each.head, each.jaccard) for each in found.heads] == [(0, 1.0), (1, 0.0)]
    same, apart = found.heads
    assert same.cosine == pytest.approx(2 * 0.75 * 0.25 / (0.75**2 + 0.25**2)) and apart.cosine == 0.0
    assert found.jaccard == pytest.approx(2 / 6) and found.shared_slots == 2 and found.shared_weight == [0.5, 0.5]
    assert found.shared == [[1, 0.375, 0.125], [2, 0.125, 0.375]]
    first, second = found.nearest
    # Rows of zeros are near to nothing.
    assert [(near.slot, near.cosine) for near in first] == [(3, 0.0), (4, pytest.approx(0.5**0.5))]
    assert first[1].nearest == 6 and [(near.slot, near.nearest) for near in second][1] == (6, 4)
    assert found.candidates == [4, 4] and found.chance == [chance_cosine(4, 3)] * 2
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((40, 500, 256))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    largest = (directions[:, 1:] @ directions[:, :1].transpose(0, 2, 1)).max(1)
    assert chance_cosine(499, 256) == pytest.approx(float(largest.mean()), rel=0.05)
    total = one.total()
    assert nearest(total, total, lambda slots: rows[slots], 5) == []
    assert (jaccard(total, total), cosine(total, total)) == (1.0, pytest.approx(1.0))


def test_letters_of_tokens_can_be_shown() -> None:
    encoder = ByteEncoder(parse_spec("byte"))
    assert [letters(encoder, token) for token in (65, 32, 10, 9, 27, 200, 256)] == [
        "A", "␣", "⏎", "⇥", "\\x1b", "�", "<end>",
    ]  # fmt: skip
    assert printable("a\x1b[31m") == "a?[31m"


def test_tables_of_long_texts_say_what_they_leave_out() -> None:
    found = made_up_inspection(150, "[red]text")
    (memory,), (text, _) = found.memories, found.texts
    said = report(found, 2)
    # What looks like markup is none.
    assert "[red]text: 150 tokens" in said and said.count("[b]") > MOST_TOKENS
    assert f"the first {MOST_TOKENS} of 150 tokens" in said
    assert not any(line == after == "" for line, after in itertools.pairwise(said.splitlines()))
    assert f"The first {MOST_COLUMNS} of 150 tokens." in heads_map(memory, text, memory.reads[0], 0).note
    assert memory_plots.ages(memory).title.startswith("30% of the slots of memory are dead")
    assert text_line(made_up_inspection(1, "x").texts[0]) == "x: 1 token"


def test_page_of_hostile_names_is_whole() -> None:
    found = made_up_inspection(5, HOSTILE)
    other = dataclasses.replace(found.memories[0], name="memory1", rows=[], overlap=None)
    found = dataclasses.replace(found, run=HOSTILE, checkpoint=HOSTILE, memories=[*found.memories, other])
    text = render_page(found, find_recipe("smoke"))
    page = read_page(text)
    assert "<script>alert" not in text and page.texts["h1"] == [f"Memories of {HOSTILE}, step 2"]
    assert {"memory-slots-1", "memory1-slots-1", "memory-overlap"} <= page.drawn
