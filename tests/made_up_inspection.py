"""Reads and findings of `mempar inspect`, made up."""

import torch

from mempar.memory.config import MemoryConfig
from mempar.tools.inspection.findings import HistoryFindings, Inspection, MemoryFindings, RowFindings, TextFindings
from mempar.tools.inspection.lookups import LookupRecord
from mempar.tools.inspection.overlap import overlap
from mempar.tools.inspection.reads import TextReads

CONFIG = MemoryConfig(variant="memory", layers=(3,), heads=2, top_k=2, num_subkeys=10)


def reads_of(*windows: list[list[list[int]]]) -> TextReads:
    """Reads of two heads and two slots a token, in one block, with weights of .75 and .25."""
    reads = TextReads(CONFIG)
    for window in windows:
        record = LookupRecord(CONFIG, torch.device("cpu"))
        slots = torch.tensor(window)
        record.add(3, slots, torch.tensor([0.75, 0.25]).expand(slots.shape))
        reads.add(record)
    return reads


def made_up_inspection(num_tokens: int, name: str) -> Inspection:
    """Two texts of so many tokens, which are shown as `[b]`, and one memory of 100 slots."""
    tokens = range(num_tokens)
    one = reads_of([[[token % 7, 8], [token % 5, 9]] for token in tokens])
    other = reads_of([[[token % 3, 7], [(token * token) % 31, 99]] for token in tokens])
    rows = RowFindings(
        table="memory.values",
        num_rows=100,
        rows=50,
        initial_rows=20,
        zero_rows=1,
        not_finite_rows=2,
        smallest=0.5,
        mean=1.0,
        largest=2.5,
        norms=[[2 ** (place / 32), 2 ** ((place + 1) / 32), 1, place % 2] for place in range(-20, 27)],
    )
    memory = MemoryFindings(
        name="memory",
        variant=CONFIG.variant,
        num_slots=CONFIG.num_slots,
        value_dim=4,
        heads=CONFIG.heads,
        top_k=CONFIG.top_k,
        blocks=list(CONFIG.layers),
        history=HistoryFindings(
            figures={"coverage": 0.4, "coverage_steps": 2, "dead_slots": 30, "dead_since_step": 0},
            ages=[[0, 20], [1, 20], [2, 20], [4, 10]],
        ),
        rows=[rows],
        reads=[each.findings(24, 3) for each in (one, other)],
        overlap=overlap(one, other, lambda slots: torch.randn(len(slots), 4), 4, 24),
    )
    texts = [
        TextFindings(name=each, tokens=num_tokens, windows=1, left_out="", shown=["[b]"] * num_tokens)
        for each in (name, "another text")
    ]
    return Inspection(
        checkpoint="step_00000002", run="toy", step=2, seed=1, date="today", texts=texts, memories=[memory]
    )
