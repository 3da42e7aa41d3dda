"""Recorded reads: what the engine writes, and that their replay asks for exactly what was sent."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mempar.errors import ConfigError
from mempar.parallel.cost import exchange_bytes
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.slot_file import load_slots
from mempar.runtime.slot_recording import SlotRecorder
from mempar.tools.simulate.loads import token_counts
from mempar.tools.simulate.replay import TraceLoads
from rank_pool import RankPool
from toy import VOCAB, Session, toy_run

CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {"mp": 2, "mp_rows": 2}),
    (4, {"mp": 4, "mp_rows": 2, "ragged": True, "merge": "on"}),
    (4, {"tp": 2, "mp": 2, "mp_rows": 2, "global_batch_size": 7}),
    (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 2, "kind": "two"}),
]


def recorded_step(run: RunConfig, folder: Path) -> dict[str, int]:
    """Train a step on this rank, recorded, and one that is not; the bytes that it sent in the first."""
    session = Session(replace(run, train=replace(run.train, trace_steps=1)))
    assert session.world.groups is not None
    recorder = SlotRecorder(session.stepper, session.model, folder)
    ledger = session.world.groups.ledger
    ledger.clear()
    with recorder.recording(0):
        session.step(0)
    sent = dict(ledger.sent_bytes)
    with recorder.recording(1):
        session.step(1)
    return sent


@pytest.mark.parametrize(("num_ranks", "settings"), CASES)
def test_replay_asks_for_what_was_sent(pool: RankPool, tmp_path: Path, num_ranks: int, settings: dict[str, Any]):
    run = toy_run(**settings)
    folder = tmp_path / "slots"
    sent = pool.run(num_ranks, recorded_step, run, folder)
    slots = load_slots(tmp_path)
    assert {step for step, _, _ in slots} == {0}
    assert {sample for _, _, sample in slots} == set(range(run.train.global_batch_size))

    layout = Layout.of(run, num_ranks, VOCAB)
    loads, grid = TraceLoads(layout, slots), layout.grid
    for rank in range(num_ranks):
        expected: Counter[str] = Counter()
        stage, place = divmod(rank, grid.stage_size)
        blocks = [block for chunk in layout.chunks_of(stage) for block in chunk.blocks if layout.memory_of(block)]
        for block in blocks:
            name = next(name for name, memory in layout.run.memories.items() if block in memory.layers)
            memory, placed = layout.run.memories[name], layout.placement.memories[name]
            for micro_batch in range(layout.batch.num_micro_batches):
                group = slice(place // grid.mp * grid.mp, (place // grid.mp + 1) * grid.mp)
                found = exchange_bytes(
                    placed.plan,
                    place % grid.mp,
                    loads.entries(block, micro_batch)[group].tolist(),
                    token_counts(layout, micro_batch)[group].tolist(),
                    reads=memory.heads * memory.top_k,
                    value_bytes=4,
                    merged=placed.merge,
                    products=memory.variant == "peer",
                )
                expected.update({phase: count for phase, count in vars(found).items() if count})
        assert expected == {phase: sent[rank].get(phase, 0) for phase in expected}
        assert expected["entries"] > 0


def traced(run: RunConfig, samples: int, seed: int = 1) -> dict[tuple[int, int, int], np.ndarray]:
    memory, rng = run.memory, np.random.default_rng(seed)
    shape = (run.train.seq_length, memory.heads, memory.top_k)
    return {
        (4, block, sample): rng.integers(0, memory.num_slots, shape, dtype=np.int32)
        for block in memory.layers
        for sample in range(samples)
    }


def test_longer_batches_repeat_the_samples():
    run = toy_run(mp=2, mp_rows=2, micro_batches=2)
    layout = Layout.of(run, 2, VOCAB)
    once, all_of_it = (TraceLoads(layout, traced(run, samples)) for samples in (2, 8))
    assert (once.entries(1, 0)[0] == once.entries(1, 0)[1]).all()
    assert (once.entries(1, 0)[0] == all_of_it.entries(1, 0)[0]).all()
    assert (all_of_it.entries(1, 0)[0] != all_of_it.entries(1, 0)[1]).any()


def test_every_reader_of_a_sequence_reads_its_part():
    run = toy_run(mp=2, mp_rows=2, micro_batches=2)
    slots = traced(run, 4)
    whole = TraceLoads(Layout.of(run, 2, VOCAB), slots).entries(1, 0)
    for layout in ({"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}):
        parts = TraceLoads(Layout.of(run.with_parallel(**layout), 4, VOCAB), slots).entries(1, 0)
        assert (parts.reshape(2, 2, 2).sum(1) == whole).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda slots: {key: value for key, value in slots.items() if key[1] != 2}, "none of block 2"),
        (lambda slots: {key: value[:-1] for key, value in slots.items()}, r"recorded as \[15, 2, 4\]"),
        (lambda slots: {key: value + 100 for key, value in slots.items()}, "of the same table"),
        (
            lambda slots: {key: np.where(value == 5, -1, value) for key, value in slots.items()},
            "files of all its ranks",
        ),
        (lambda slots: {key: value for key, value in slots.items() if key[1] == key[2] + 1}, "no sample that all"),
        (lambda slots: {}, "none of block 1"),
    ],
)
def test_traces_of_another_run_are_refused(change: Any, message: str):
    run = toy_run(mp=2, mp_rows=2)
    with pytest.raises(ConfigError, match=message):
        TraceLoads(Layout.of(run, 2, VOCAB), change(traced(run, 3)))


def test_recording_under_context_parallelism_is_refused():
    run = toy_run(cp=2)
    with pytest.raises(ConfigError, match=r"trace_steps=1 with parallel\.cp=2"):
        replace(run, train=replace(run.train, trace_steps=1))
