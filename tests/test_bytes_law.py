"""The bytes law: what is handed to collectives equals the formulas of parallel/cost.py, byte for byte.

The ledger counts tensors and does not know the formulas; the formulas are evaluated here in actual
counts, which are taken from the slots that the ranks recorded. Marks take the bytes of each call, and a
profile sets beside them what the formulas say in the counts that ranks noted: the two are one, row by row.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import toy
from layout_cases import LAYOUTS as LAW_LAYOUTS
from layout_cases import MOE_LAYOUTS
from mempar.dims import even_cuts
from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import copy_sync_bytes, exchange_bytes, token_split_bytes
from mempar.runtime.config import RunConfig
from mempar.runtime.optim import StepReport
from mempar.runtime.placement import Placement, place
from mempar.runtime.profile.recorder import Recorder
from mempar.tools.profile.merge import merge_rows
from mempar.tools.profile.predicted import PREDICTED
from rank_pool import RankPool
from toy import History, Seen, Session, batches_of, joined, toy_run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "columns": (2, {"mp": 2, "mp_rows": 1}),
    "rows": (3, {"mp": 3, "mp_rows": 3}),
    "three-columns": (3, {"mp": 3, "mp_rows": 1}),
    "grid": (4, {"mp": 4, "mp_rows": 2}),
    "three-by-two": (6, {"mp": 6, "mp_rows": 3}),
    "two-hops": (4, {"mp": 4, "mp_rows": 2, "mp_hops": 2}),
    "three-by-two-in-two-hops": (6, {"mp": 6, "mp_rows": 3, "mp_hops": 2}),
    "replicas": (4, {"mp": 2, "mp_rows": 2}),
    "replicas-of-all": (2, {}),
    "stage-copies": (2, {"pp": 2}),
    "stage-copies-and-replicas": (8, {"pp": 2, "mp": 2, "mp_rows": 1}),
    "tp-columns": (2, {"tp": 2, "mp": 2, "mp_rows": 1}),
    "tp-rows-over-two-groups": (4, {"tp": 2, "mp": 4, "mp_rows": 4}),
    "tp-without-mp": (2, {"tp": 2}),
    "sp-rows": (2, {"tp": 2, "sequence_parallel": True, "mp": 2, "mp_rows": 2}),
    "sp-grid": (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2}),
    "tp-two-hops": (4, {"tp": 2, "mp": 4, "mp_rows": 2, "mp_hops": 2}),
    "two-hops-and-replicas": (8, {"mp": 4, "mp_rows": 2, "mp_hops": 2}),
    "vpp-columns": (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 1}),
    "experts": (4, {"mp": 2, "mp_rows": 2, "ep": 2}),
    "distributed-optimizer-rows": (2, {"mp": 2, "mp_rows": 2, "distributed_optimizer": True}),
}
STEPS = 2
BYTES = {"float32": 4, "float64": 8, "bf16": 2}


# float32 on all layouts, on most at both sizes; other widths of values and scores where phases differ; merged
# duplicates in every form of the exchange.
LARGE = ("two-hops", "tp-two-hops", "two-hops-and-replicas", "three-by-two", "three-columns")
CASES: list[tuple[str, dict[str, Any]]] = [
    (layout, {"ragged": ragged})
    for layout in LAYOUTS
    for ragged in (False, True)
    if (ragged or layout not in LARGE) and layout != "experts"
]
CASES += [(layout, {"dtype": "bf16", "ragged": True}) for layout in ("columns", "grid", "replicas", "sp-grid")]
CASES += [
    (layout, {"dtype": "float64", "ragged": True}) for layout in ("rows", "tp-columns", "stage-copies-and-replicas")
]
CASES += [
    (layout, {"ragged": True, "merge": "on"}) for layout in ("columns", "rows", "grid", "three-by-two-in-two-hops")
]
CASES += [
    (layout, {"dtype": "bf16", "ragged": True, "merge": "on"}) for layout in ("tp-rows-over-two-groups", "tp-two-hops")
]
# Layers that are computed again, and micro-batches with fewer samples than the others' or none.
CASES += [
    (layout, {"recompute": "full", "missing": 3})
    for layout in ("columns", "grid", "replicas-of-all", "tp-rows-over-two-groups", "sp-rows", "vpp-columns")
]
CASES += [
    ("rows", {"ragged": True, "recompute": "selective", "missing": 2}),
    ("stage-copies", {"recompute": "selective"}),
    # Attention alone is computed again: nothing is sent twice.
    ("grid", {"ragged": True, "recompute": "selective", "recompute_modules": ("core_attn",)}),
    ("three-by-two-in-two-hops", {"recompute": "full", "missing": 1}),
]
# Experts of one neuron: rows are found once, for both tables. Several memories; a memory among experts.
CASES += [
    ("grid", {"kind": "peer", "ragged": True}),
    ("three-by-two-in-two-hops", {"kind": "peer", "ragged": True, "recompute": "full"}),
    ("tp-columns", {"kind": "peer", "dtype": "bf16", "recompute": "selective"}),
    ("tp-rows-over-two-groups", {"kind": "peer", "dtype": "float64", "ragged": True, "merge": "on"}),
    ("sp-rows", {"kind": "peer"}),
    ("stage-copies-and-replicas", {"kind": "peer", "ragged": True}),
    ("three-columns", {"kind": "two", "ragged": True}),
    ("stage-copies-and-replicas", {"kind": "two"}),
    ("replicas", {"kind": "beside", "ragged": True}),
    ("experts", {"kind": "memory_plus+moe"}),
]
# What the layout law has beside these.
NEW = {name: (*of, {"ragged": True}) for name, of in LAW_LAYOUTS.items() if of not in LAYOUTS.values()}
EXPERTS = {name: of for name, of in MOE_LAYOUTS.items() if "memory" in of[2]["kind"]}
NEW |= {f"moe-{name}": of for name, of in EXPERTS.items() if of[:2] not in LAYOUTS.values()}
LAYOUTS |= {name: of[:2] for name, of in NEW.items()}
CASES += [(name, settings) for name, (*_, settings) in NEW.items()]


def train_counting(run: RunConfig, steps: int) -> Seen:
    """Train, and note the bytes of each phase; with marks on."""
    ledgers: list[Any] = []

    def observe(session: Session, seen: Seen) -> None:
        assert session.world.groups is not None
        session.world.groups.ledger.clear()
        ledgers.append(session.world.groups.ledger)
        recorder, train_step = Recorder(session.world, session.model), session.step

        def recorded(step: int) -> StepReport:
            with recorder.step(step + 1):
                report = train_step(step)
            seen.extra["recording"] = recorder.take(keep=True)
            return report

        session.step = recorded

    seen = toy.train(run, steps, None, ("slots",), observe)
    seen.extra["bytes"] = {phase: count for phase, count in ledgers[0].sent_bytes.items() if count}
    return seen


class Counting:
    """Actual counts of a run, from the slots that its ranks recorded."""

    def __init__(self, history: History, placement: Placement) -> None:
        self.run, self.trace, self.placement = history.run, history.trace, placement
        self.grid = placement.grid
        self.groups = self.grid.memory_groups(placement.table_stages)
        self.tp, self.shared_lookup = history.run.parallel.tp, not history.run.parallel.sequence_parallel
        self.recomputed = history.run.train.runs_memory_again
        self.saved_reads = 0

    def blocks_of(self, memory: MemoryConfig, stage: int) -> list[int]:
        sizes, model = self.run.parallel, self.run.model
        per_chunk = model.num_layers // (sizes.pp * sizes.vpp)
        return [block for block in memory.layers if block // per_chunk % sizes.pp == stage]

    def lookups(self, memory: MemoryConfig, rank: int) -> Iterator[np.ndarray]:
        """The slots `[T, M]` of every lookup of one step that a rank makes for itself, token-split applied.

        In the order of micro-batches, so that the i-th lookups of a group's members belong together.
        """
        tp_rank, dp_rank = self.grid.tp_rank(rank), self.grid.dp_rank(rank)
        reads = memory.heads * memory.top_k
        for batch in batches_of(self.run, self.step, dp_rank=dp_rank, dp=self.grid.dp):
            for block in self.blocks_of(memory, self.grid.stage_of(rank)):
                # Activations are [positions, samples], positions outermost.
                each = [self.trace.slots[self.step, block, sample] for sample in batch.sample_ids]
                if not each:
                    yield np.zeros((0, reads), dtype=np.int32)
                    continue
                slots = np.stack(each, axis=1)
                if not self.shared_lookup:
                    slots = slots[even_cuts(len(slots), self.tp)[tp_rank] : even_cuts(len(slots), self.tp)[tp_rank + 1]]
                tokens = slots.reshape(-1, reads)
                if self.shared_lookup:
                    cuts = even_cuts(len(tokens), self.tp)
                    tokens = tokens[cuts[tp_rank] : cuts[tp_rank + 1]]
                yield tokens

    def _entries(self, slots: np.ndarray) -> np.ndarray:
        """Slots of the entries that stand for the reads `[T, M]` of some tokens."""
        entries = [slot for token in slots.tolist() for slot in set(token)]
        self.saved_reads += slots.size - len(entries)
        return np.array(entries, dtype=np.int64)

    def expected(self, rank: int, step: int) -> Counter[str]:
        """Bytes that a rank sends in one step, by phase, after the formulas."""
        self.step = step
        total: Counter[str] = Counter()
        group = next((ranks for ranks in self.groups if rank in ranks), None)
        if group is None:
            return total
        for name, memory in self.run.memories.items():
            total.update(self._of_memory(name, memory, rank, group))
        return total

    def _of_memory(self, name: str, memory: MemoryConfig, rank: int, group: list[int]) -> Counter[str]:
        total: Counter[str] = Counter()
        plan, member = self.placement.memories[name].plan, group.index(rank)
        if self.grid.stage_of(rank) not in self.placement.memories[name].stages:
            return total
        widths = {"reads": memory.heads * memory.top_k, "value_bytes": self.run.value_bytes_of(memory)}
        cuts = np.array(plan.row_cuts)
        touched: set[int] = set()
        for slots in zip(*(self.lookups(memory, other) for other in group), strict=True):
            tokens = [len(part) for part in slots]
            first, end = cuts[plan.row_shard(member)], cuts[plan.row_shard(member) + 1]
            for part in slots:
                touched.update(part[(part >= first) & (part < end)].tolist())
            if len(group) > 1:
                merged = memory.merge_duplicates == "on"
                entries = [self._entries(part) if merged else part for part in slots]
                counted = exchange_bytes(
                    plan,
                    member,
                    [np.histogram(part, cuts)[0].tolist() for part in entries],
                    tokens,
                    hops=self.run.parallel.mp_hops,
                    merged=merged,
                    products=memory.variant == "peer",
                    recomputed=self.recomputed,
                    **widths,
                )
                total.update(vars(counted))
            if self.tp > 1 and self.shared_lookup:
                forward, backward = token_split_bytes(
                    self.tp,
                    tokens[member],
                    value_dim=plan.value_dim,
                    # Scores are in float32 at least, and in the training dtype whatever the table's.
                    score_bytes=8 if self.run.train.dtype == "float64" else 4,
                    vector_bytes=BYTES[self.run.train.dtype] if memory.variant == "peer" else 0,
                    recomputed=self.recomputed,
                    **widths,
                )
                total.update(token_gather=forward, score_gather=backward)
        start, stop = plan.columns_of(member)
        copies = sum(self.grid.stage_of(ranks[0]) in self.placement.memories[name].stages for ranks in self.groups)
        sync = copy_sync_bytes(
            copies, len(touched), num_columns=stop - start, grad_bytes=max(4, self.run.value_bytes_of(memory))
        )
        total["copy_sync"] += sync * len(memory.table_names)
        return total


def case_name(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-".join(f"{name}={setting}" for name, setting in value.items())


def check_rows(history: History, run: RunConfig) -> None:
    """Rows of a profile say what the ledgers say, and what is predicted for each is what was measured."""
    rows = merge_rows(run, [seen.extra["recording"] for seen in history.seen])
    for rank, seen in enumerate(history.seen):
        measured: Counter[str] = Counter()
        for row in rows:
            if row.rank == rank and row.phase in PREDICTED:
                assert row.bytes_predicted == row.bytes_measured, row
                assert (row.layer in run.memory_layers) == (row.phase != "copy_sync")
                measured[row.phase] += row.bytes_measured
        assert {phase: count for phase, count in measured.items() if count} == seen.extra["bytes"]


@pytest.mark.parametrize(("layout", "settings"), CASES, ids=case_name)
def test_bytes_of_a_step_equal_formulas(layout: str, settings: dict[str, Any], pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    settings = dict(settings)
    dp = world_size // (sizes.get("tp", 1) * sizes.get("pp", 1))
    micro_batches = {3: 6, 6: 6, 8: 8}.get(dp, 4)
    samples = micro_batches * (1 if settings.get("ragged") else 2) - settings.pop("missing", 0)
    run = toy_run(global_batch_size=samples, **settings, **sizes)
    history = joined(run, pool.run(world_size, train_counting, run, STEPS))
    counting = Counting(history, place(run, world_size))
    anything = 0
    for rank, seen in enumerate(history.seen):
        expected: Counter[str] = Counter()
        for step in range(STEPS):
            expected.update(counting.expected(rank, step))
        assert seen.extra["bytes"] == {phase: count for phase, count in expected.items() if count}, f"rank {rank}"
        anything += sum(expected.values())
    assert anything > 0
    check_rows(history, run)
    assert (counting.saved_reads > 0) == (settings.get("merge") == "on")


@pytest.mark.parametrize(("layout", "dtype"), [("tp-columns", "float32"), ("stage-copies-and-replicas", "float64")])
def test_bytes_follow_the_dtype_of_the_table(layout: str, dtype: str, pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    run = toy_run(dtype=dtype, ragged=True, memory={"dtype": "bf16", "rounding": "stochastic"}, **sizes)
    assert run.value_bytes_of(run.memory) == 2
    history = joined(run, pool.run(world_size, train_counting, run, 1))
    counting = Counting(history, place(run, world_size))
    for rank, seen in enumerate(history.seen):
        expected = {phase: count for phase, count in counting.expected(rank, 0).items() if count}
        assert seen.extra["bytes"] == expected, f"rank {rank}"
        assert expected
    check_rows(history, run)


def test_counting_reads_no_formula() -> None:
    # The measured twin must not import what it is compared with.
    import mempar.marks
    import mempar.parallel.collectives
    import mempar.parallel.exchange
    import mempar.parallel.ledger
    import mempar.parallel.one_hop
    import mempar.parallel.two_hops
    import mempar.runtime.profile.recorder

    parallel, recording = mempar.parallel, mempar.runtime.profile
    modules = [parallel.collectives, parallel.exchange, parallel.ledger, parallel.one_hop, parallel.two_hops]
    modules += [mempar.marks, recording.collectives, recording.recorder, recording.recording]
    for module in modules:
        assert "cost" not in vars(module)
        assert not any(getattr(value, "__module__", "") == "mempar.parallel.cost" for value in vars(module).values())
