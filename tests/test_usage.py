"""Usage of the table equals a brute-force count of recorded slots, in every layout.

Tests of `mempar.memory.usage`, `mempar.parallel.read_counts` and `mempar.runtime.usage`.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import toy
from mempar.dims import TableSlice
from mempar.memory.config import MemoryConfig
from mempar.memory.layer import MemoryLayer
from mempar.memory.lookup import LocalReader, Readers
from mempar.memory.usage import LookupTally, RowHistory, read_skew
from mempar.memory.values import ValueShard
from mempar.parallel.cost import add_by_key_bytes
from mempar.parallel.groups import make_memory_groups
from mempar.parallel.ranks import RankGrid
from mempar.parallel.read_counts import ReadCounts, count_reads
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig
from mempar.runtime.data.samples import Batch
from mempar.runtime.in_flight import InFlight
from mempar.runtime.memory_mlp import MemoryMLP
from mempar.runtime.placement import place
from mempar.runtime.tables import TableAccess
from mempar.runtime.usage import UsageMonitor, usage_lines
from rank_pool import RankPool
from toy import History, Seen, Session, joined

STEPS, INTERVAL = 4, 2
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "rows": (3, {"mp": 3, "mp_rows": 3}),
    "columns": (2, {"mp": 2, "mp_rows": 1}),
    "grid": (6, {"mp": 6, "mp_rows": 3}),
    "replicas": (2, {}),
    "replicas-of-a-grid": (8, {"mp": 4, "mp_rows": 2}),
    "tp": (2, {"tp": 2}),
    "tp-rows": (4, {"tp": 2, "mp": 4, "mp_rows": 4}),
    "sp-grid": (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2}),
    "stage-copies": (4, {"pp": 2, "mp": 2, "mp_rows": 2}),
    "one-stage-of-two": (2, {"pp": 2, "kind": "memory", "layers": (2, 3)}),
    "two-memories-beside-experts": (4, {"pp": 2, "mp": 2, "mp_rows": 2, "kind": "two", "layers": (1, 3)}),
    "virtual-stages": (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 1}),
}


def make_run(world_size: int = 1, *, layers: tuple[int, ...] = (1, 2, 3), **changes: Any) -> RunConfig:
    """A toy whose table is larger than what one step reads, in float64 so that all layouts choose alike."""
    pp = changes.get("pp", 1)
    dp = world_size // (changes.get("tp", 1) * pp)
    run = toy.toy_run(dtype="float64", **{"micro_batches": dp * (2 * pp if pp > 1 else 1), **changes})
    return replace(
        run,
        memory=replace(run.memory, layers=layers, num_subkeys=37, usage_interval=INTERVAL),
        more_memories=tuple(
            replace(memory, num_subkeys=40, usage_interval=2 * INTERVAL) for memory in run.more_memories
        ),
    )


def train_watched(run: RunConfig) -> Seen:
    """Train and note the figures of every step, and the entropies that this rank's layers had.

    An evaluation stands between each step and its report: it must not count.
    """

    def observe(session: Session, seen: Seen) -> None:
        since = dict.fromkeys(run.memories, 0)
        monitor = UsageMonitor(run, session.world, session.model, session.optimizers, since)
        entropies: Counter[tuple[int, int, int]] = Counter()
        seen.extra.update(figures=[], entropies=entropies)
        train_step, plain_choose = session.step, MemoryLayer.choose

        def choose(layer: Any, x: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
            slots, weight = plain_choose(layer, x, slots)
            by_head = -(weight * weight.log()).sum(-1).sum(0)
            for head, entropy in enumerate(by_head.tolist()):
                entropies[session.tracer.step, layer.block, head] += entropy
            return slots, weight

        def step(number: int) -> Any:
            monitor.watch(number + 1)
            with patch.object(MemoryLayer, "choose", choose):
                report = train_step(number)
            evaluate(session)
            seen.extra["figures"].append(monitor.report(number + 1))
            return report

        session.step = step  # type: ignore[method-assign]

    return toy.train(run, STEPS, None, ("slots",), observe)


def evaluate(session: Session) -> None:
    """Look up other samples without recording them."""
    grid = session.grid
    session.model.hook_slots(None)
    session.stepper.evaluate(toy.batches_of(session.run, 1, dp_rank=grid.dp_rank(session.world.rank), dp=grid.dp))
    session.model.hook_slots(session.tracer)


def slots_read(history: History, memory: MemoryConfig, steps: range) -> np.ndarray:
    """Every slot that a memory's layers read in some steps, as often as it was read."""
    found = [s for (step, block, _), s in history.trace.slots.items() if step in steps and block in memory.layers]
    return np.concatenate([slots.ravel() for slots in found])


def brute_force(history: History, name: str, step: int, row_cuts: list[int]) -> dict[str, float]:
    """A memory's figures of a step, counted from 0, out of all slots that were read up to it."""
    memory = history.run.memories[name]
    num_slots = memory.num_slots
    window = np.unique(slots_read(history, memory, range(step + 1 - memory.usage_interval, step + 1)))
    ever = np.unique(slots_read(history, memory, range(step + 1)))
    reads = np.bincount(slots_read(history, memory, range(step, step + 1)), minlength=num_slots)
    share = reads[reads > 0] / reads.sum()
    by_shard = [reads[start:end].sum() for start, end in itertools.pairwise(row_cuts)]
    return {
        f"{name}_coverage": len(window) / num_slots,
        f"{name}_coverage_steps": memory.usage_interval,
        f"{name}_dead_slots": num_slots - len(ever),
        f"{name}_dead_since_step": 0,
        f"{name}_reads": int(reads.sum()),
        f"{name}_busiest_slot_reads": int(reads.max()),
        f"{name}_busiest_percent_share": np.sort(reads)[::-1][: math.ceil(num_slots / 100)].sum() / reads.sum(),
        f"{name}_effective_slots_share": math.exp(-(share * np.log(share)).sum()) / num_slots,
        f"{name}_shard_imbalance": max(by_shard) / np.mean(by_shard),
    }


def memories_due(run: RunConfig, step: int) -> dict[str, MemoryConfig]:
    """Memories that report after a step, counted from 0."""
    return {name: memory for name, memory in run.memories.items() if (step + 1) % memory.usage_interval == 0}


@pytest.fixture(scope="module", params=LAYOUTS)
def history(pool: RankPool, request: pytest.FixtureRequest) -> History:
    """A watched run in each layout."""
    world_size, sizes = LAYOUTS[request.param]
    run = make_run(world_size, **sizes)
    return joined(run, pool.run(world_size, train_watched, run))


def test_figures_equal_a_brute_force_count(history: History) -> None:
    run = history.run
    placed = place(run, len(history.seen)).memories
    for step in range(STEPS):
        figures = history.seen[0].extra["figures"][step]
        assert all(seen.extra["figures"][step] == figures for seen in history.seen)
        expected: dict[str, float] = {}
        for name in memories_due(run, step):
            expected |= brute_force(history, name, step, placed[name].plan.row_cuts)
            assert 0 < expected[f"{name}_dead_slots"] < run.memories[name].num_slots
            assert expected[f"{name}_coverage"] < 1.0 < expected[f"{name}_busiest_slot_reads"]
        found = {name: value for name, value in figures.items() if "/" not in name}
        assert found == pytest.approx(expected, rel=1e-12)
        integers = [name for name, value in expected.items() if isinstance(value, int)]
        assert [found[name] for name in integers] == [expected[name] for name in integers]
        assert bool(figures) == ((step + 1) % INTERVAL == 0)


def test_head_entropies_are_means_over_the_tokens_of_the_batch(history: History) -> None:
    run = history.run
    # Tensor-parallel ranks hold the same tokens, unless sequences are split.
    copies = 1 if run.parallel.sequence_parallel else run.parallel.tp
    tokens = run.train.global_batch_size * run.train.seq_length
    sums = sum((view.extra["entropies"] for view in history.seen), Counter())
    for step in range(STEPS):
        expected = {
            f"{name}_entropy/block_{block}/head_{head}": sums[step, block, head] / copies / tokens
            for name, memory in memories_due(run, step).items()
            for block in memory.layers
            for head in range(memory.heads)
        }
        assert all(0.0 < entropy < math.log(4) for entropy in expected.values())
        figures = history.seen[0].extra["figures"][step]
        assert {name: value for name, value in figures.items() if "/" in name} == pytest.approx(expected, rel=1e-12)


def test_every_layout_counts_as_the_single_process_does(pool: RankPool) -> None:
    """The same slots are read, so all figures but the balance of shards are the same."""
    run = make_run(ragged=True, micro_batches=4)
    split = make_run(ragged=True, micro_batches=4, tp=2, pp=2, mp=2, mp_rows=2)
    (single,), ranks = pool.run(1, train_watched, run), pool.run(4, train_watched, split)
    for found, expected in zip(ranks[3].extra["figures"], single.extra["figures"], strict=True):
        assert found.pop("memory_shard_imbalance", 1.0) >= expected.pop("memory_shard_imbalance", 1.0) == 1.0
        assert found == pytest.approx(expected, rel=1e-12)


def layer_and_tally(num_tokens: int, *, recomputed: bool) -> tuple[MemoryMLP, TableAccess, LookupTally, Tensor]:
    run = make_run()
    part = TableSlice(num_slots=1369, value_dim=24, row_start=0, row_end=1369, column_start=0, column_end=24)
    shard = ValueShard(part, seed=1, dtype=torch.float32, device=torch.device("cpu"))
    in_flight, tokens = InFlight(runs_again=recomputed), torch.zeros(1, num_tokens, dtype=torch.int64)
    in_flight.current = Batch(
        tokens=tokens, labels=tokens, loss_mask=tokens.float(), position_ids=tokens, sample_ids=[0], sample_counts=[1]
    )
    access = TableAccess(Readers(values=LocalReader(shard)), in_flight, [0], 24)
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    layer = MemoryMLP(config, run, run.memory, access)
    torch.nn.init.normal_(layer.keys)
    layer.set_layer_number(3)
    access.tally = LookupTally(run.memory.layers, run.memory.heads, torch.device("cpu"))
    return layer, access, access.tally, torch.randn(num_tokens, 1, 24, requires_grad=True)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_lookup_counts_once_recomputed_or_not(recomputed: bool) -> None:
    layer, access, tally, x = layer_and_tally(num_tokens=7, recomputed=recomputed)
    out = checkpoint(layer, x, use_reentrant=True)[0] if recomputed else layer(x)[0]
    out.sum().backward()
    assert tally.tokens == [0, 7, 0]
    assert int(tally.reads()[1].sum()) == 7 * 2 * 4
    with torch.no_grad():
        layer(x)
    access.tally = None
    layer(x)
    assert tally.tokens == [0, 7, 0]


def test_two_heads_that_read_the_same_slot_count_twice() -> None:
    tally = LookupTally((5,), 2, torch.device("cpu"))
    slots = torch.tensor([[[3, 8], [8, 1]], [[8, 3], [0, 3]]])
    weight = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]])
    tally.add(5, slots, weight)
    read, counts = tally.reads()
    assert dict(zip(read.tolist(), counts.tolist(), strict=True)) == {0: 1, 1: 1, 3: 3, 8: 3}
    uneven = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    # A weight that vanished adds nothing.
    np.testing.assert_allclose(tally.entropy_sum.tolist(), [[uneven, 2 * math.log(2.0)]], rtol=1e-15)


def test_row_history_knows_the_last_step_of_each_row() -> None:
    history = RowHistory(6, torch.device("cpu"))
    for rows in ([0, 1], [], [1, 4], [4]):
        history.mark(torch.tensor(rows, dtype=torch.int32))
    assert history.last_read.tolist() == [1, 3, 0, 0, 4, 0]
    assert [history.rows_read_in(steps) for steps in (1, 2, 3, 4)] == [1, 2, 2, 3]
    assert history.rows_never_read() == 3


def test_read_skew_of_known_counts() -> None:
    even = read_skew([(7, 300)], 300)
    assert (even.reads, even.busiest_slot_reads, even.busiest_share) == (2100, 7, 3 / 300)
    assert even.effective_share == pytest.approx(1.0, rel=1e-14)
    # The busiest hundredth of 150 slots are two: all of the first and one of the second kind.
    steep = read_skew([(1, 10), (50, 1), (20, 3)], 150)
    assert (steep.reads, steep.busiest_slot_reads, steep.busiest_share) == (120, 50, 70 / 120)
    assert read_skew([(9, 1)], 50).effective_share == pytest.approx(1 / 50, rel=1e-14)
    assert read_skew([], 50).reads == 0


def count_on_rank(grid: RankGrid, plan: ShardPlan, reads: list[list[int]]) -> tuple[ReadCounts, int]:
    groups, made = make_memory_groups(grid, dist.get_rank(), [(0,)], None)
    slots, counts = torch.unique(torch.tensor(reads[dist.get_rank()], dtype=torch.int64), return_counts=True)
    found = count_reads(slots, counts, plan, groups.memory, groups.copies[0])
    for group in made:
        dist.destroy_process_group(group)
    return found, groups.ledger.sent_bytes["read_counts"]


@pytest.mark.parametrize(("mp", "mp_rows", "world"), [(6, 3, 6), (4, 2, 8), (3, 3, 6), (2, 1, 4), (1, 1, 3)])
def test_counts_and_bytes_of_uneven_and_empty_ranks(mp: int, mp_rows: int, world: int, pool: RankPool) -> None:
    plan = ShardPlan(num_slots=31, value_dim=8, column_tile=2, num_row_shards=mp_rows, num_column_shards=mp // mp_rows)
    grid = RankGrid(world=world, mp=mp, mp_rows=mp_rows)
    draw = np.random.default_rng(world * mp)
    reads = [draw.zipf(1.5, size).clip(1, 31) - 1 for size in [0, *draw.integers(1, 90, world - 1)]]
    results = pool.run(world, count_on_rank, grid, plan, [row.tolist() for row in reads])
    counts = np.bincount(np.concatenate(reads), minlength=31)
    assert dict(results[0][0].histogram) == dict(Counter(counts[counts > 0].tolist()))
    assert all(result.histogram == [] for result, _ in results[1:])
    for rank, (result, sent_bytes) in enumerate(results):
        member, group = rank % mp, range(rank - rank % mp, rank - rank % mp + mp)
        rows = slice(*plan.row_cuts[plan.row_shard(member) :][:2])
        first = rank < mp_rows
        assert result.shard_reads == (counts[rows].sum() if first else 0)
        distinct = np.unique(reads[rank])
        mine = (distinct >= rows.start) & (distinct < rows.stop) & (member < mp_rows)
        in_group = np.unique(np.concatenate([reads[other] for other in group]))
        to_first_copy = ((in_group >= rows.start) & (in_group < rows.stop)).sum() if mp_rows > member < rank else 0
        to_first_member = len(np.unique(counts[rows][counts[rows] > 0])) if first and rank else 0
        assert sent_bytes == (
            add_by_key_bytes(mp, len(distinct) - mine.sum())
            + add_by_key_bytes(world // mp, to_first_copy)
            + add_by_key_bytes(mp, to_first_member)
        )


def test_usage_that_is_off_keeps_and_counts_nothing(pool: RankPool) -> None:
    run = make_run()
    run = replace(run, memory=replace(run.memory, usage_interval=0))
    assert pool.run(1, keeps_history, run) == [False]
    assert pool.run(1, keeps_history, make_run()) == [True]


def keeps_history(run: RunConfig) -> bool:
    session = Session(run)
    session.step(0)
    assert session.model.access["memory"].tally is None
    return list(session.optimizers.histories) == ["memory"]


def test_usage_lines_say_the_figures() -> None:
    figures: dict[str, float] = {
        "memory1_coverage": 0.8125,
        "memory1_coverage_steps": 100,
        "memory1_dead_slots": 12,
        "memory1_dead_since_step": 40,
        "memory1_busiest_percent_share": 0.25,
        "memory1_shard_imbalance": 1.5,
        "memory1_entropy/block_2/head_0": 1.0,
        "memory1_entropy/block_2/head_1": 2.0,
    }
    (line,) = usage_lines(figures, make_run(kind="two", layers=(1, 3)))
    for words in ("memory1: 81.2% of", "in 100 steps", "12 never since step 40", "25.0% of", "1.50 of the mean"):
        assert words in line
    assert "1.00 to 2.00 of 1.10 nats" in line
    assert usage_lines({}, make_run()) == []
