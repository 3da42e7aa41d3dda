"""Recording steps: what is trained stays the same, megatron's collectives are seen, and torch is put back."""

import dataclasses
import itertools
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mempar.marks import Marks, Note, Span
from mempar.runtime import bringup
from mempar.runtime.config import RunConfig
from mempar.runtime.profile import recorder
from mempar.runtime.profile.collectives import WatchedCollectives
from mempar.runtime.profile.recorder import Recorder
from mempar.runtime.profile.recording import Recording, ShardReads
from mempar.tools.profile.trace import trace
from rank_pool import RankPool
from test_profile_trace import SCHEMA
from toy import Session, digests, toy_run
from trace_check import check_times, problems

STEPS = 1
TORCH = ("all_reduce", "all_gather_into_tensor", "isend", "irecv", "P2POp", "batch_isend_irecv", "_coalescing_manager")


def record(run: RunConfig) -> Recording:
    """Train twice, with marks and without; everything is the same bit for bit."""
    originals = [getattr(dist, name) for name in TORCH]
    told, recordings = [], []
    for recorded in (True, False):
        session = Session(run)
        # Looking at gradients takes collectives of its own.
        session.optimizers.watching = False
        recording = Recorder(session.world, session.model)
        reports = []
        for step in range(STEPS):
            if not recorded:
                reports.append(session.step(step))
                continue
            with recording.step(step + 1):
                reports.append(session.step(step))
        assert [getattr(dist, name) for name in TORCH] == originals
        told.append((reports, digests(session)))
        recordings.append(recording.take())
        bringup.tear_down(session.world)
    assert told[0] == told[1]
    assert recordings[1].spans == recordings[1].notes == []
    return recordings[0]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "rows": (2, {"mp": 2, "mp_rows": 2, "extras": True}),
    "pipeline": (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 1}),
    "stages": (2, {"pp": 2, "kind": "two", "recompute": "full"}),
    "tensor": (2, {"tp": 2, "mp": 2, "mp_rows": 1, "kind": "peer", "recompute": "selective"}),
    "sequence": (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2, "distributed_optimizer": True}),
    "experts": (2, {"kind": "memory_plus+moe", "ep": 2}),
    "dense": (2, {"kind": "dense", "tp": 2}),
}
COLLECTIVES = {
    "rows": {"all_reduce/dp", "all_reduce/world"},
    "pipeline": {"send/pp", "receive/pp", "all_reduce/dp", "broadcast/pp", "all_reduce/world"},
    "stages": {"send/pp", "receive/pp", "broadcast/pp", "all_reduce/world"},
    "tensor": {"all_reduce/tp", "all_reduce/world"},
    "sequence": {
        *("all_gather/tp", "reduce_scatter/tp", "all_reduce/tp"),
        *("reduce_scatter/dp", "all_gather/dp", "all_reduce/dp", "all_reduce/world"),
    },
    "experts": {"all_to_all/ep", "all_gather/ep", "all_reduce/dp", "all_reduce/world"},
    "dense": {"all_reduce/tp", "all_reduce/world"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_run_is_bit_for_bit_the_unrecorded_one(layout: str, pool: RankPool) -> None:
    world_size, settings = LAYOUTS[layout]
    run = toy_run(**settings)
    recordings = pool.run(world_size, record, run)
    phases = {span.phase for recording in recordings for span in recording.spans}
    assert {phase for phase in phases if "/" in phase} == COLLECTIVES[layout]
    found = trace({recording.rank: recording.spans for recording in recordings})
    assert problems(found, SCHEMA) == []
    check_times(found)
    # Every pass of a memory layer has its arrows, but for what is computed again.
    arrows = sum(event["ph"] == "s" for event in found["traceEvents"])
    assert (arrows > 0) == bool(run.memories)
    for recording in recordings:
        check_spans(recording)
        check_twins(run, recording)


def check_spans(recording: Recording) -> None:
    """Spans lie in the step that took so long, end in order, and computation does not overlap."""
    for step in range(1, STEPS + 1):
        spans = [span for span in recording.spans if span.step == step]
        taken = max(span.end_ns for span in spans) - min(span.start_ns for span in spans)
        assert taken <= recording.seconds[step - 1] * 1e9
        assert [span.end_ns for span in spans] == sorted(span.end_ns for span in spans)
        computing = sorted((span.start_ns, span.end_ns) for span in spans if not span.group)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(computing))
    for span in recording.spans:
        assert 0 <= span.exposed_ns <= span.end_ns - span.start_ns
        assert bool(span.group) or (span.num_bytes, span.message_bytes, span.exposed_ns) == (0, 0, 0)
        assert span.num_bytes <= span.message_bytes
        assert ("/" in span.phase) <= (span.layer == span.micro_batch == -1)


def check_twins(run: RunConfig, recording: Recording) -> None:
    """Phases of a layer come once a micro-batch forward (twice where it is computed again), and once backward."""
    calls: dict[int, Counter[str]] = defaultdict(Counter)
    for span in recording.spans:
        if span.layer >= 0:
            calls[span.layer][span.phase] += 1
    for counted in calls.values():
        again = 2 if run.train.runs_memory_again else 1
        for phase in ("query", "topk", "gather"):
            assert counted[phase] == again * counted[f"{phase}_backward"] > 0, phase
        assert counted["gate"] == again * counted["gate_backward"]


def test_reads_of_all_shards_are_those_of_all_tokens(pool: RankPool) -> None:
    run = toy_run(mp=2, mp_rows=2)
    recordings = pool.run(2, record, run)
    served = sum(count * rows for each in recordings for count, rows in each.tables[0].rows_by_reads)
    tokens = run.train.global_batch_size * run.train.seq_length
    assert served == STEPS * len(run.memory_layers) * tokens * run.memory.heads * run.memory.top_k
    for recording in recordings:
        (table,) = recording.tables
        assert table.rows_by_reads == sorted(table.rows_by_reads, reverse=True)
        assert 0 < sum(rows for _, rows in table.rows_by_reads) <= table.num_rows


class SlowMarks(Marks):
    """Marks that count waits for the device, and whose conversion can take long."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped, self.seconds = 0, 0.0

    def stop(self) -> None:
        self.stopped += 1
        super().stop()

    def collect(self) -> tuple[list[Span], list[Note]]:
        time.sleep(self.seconds)
        return super().collect()


def stand_in(monkeypatch: pytest.MonkeyPatch, num_rows: int = 5) -> tuple[Recorder, SimpleNamespace]:
    """A recorder of one rank without torch's process groups, and its only shard."""
    monkeypatch.setattr(recorder, "_process_groups", lambda tp, cp: [])
    shard = SimpleNamespace(part=SimpleNamespace(num_rows=num_rows), reads=None)
    model = SimpleNamespace(tables=[SimpleNamespace(name="memory.values", shard=shard)])
    placement = SimpleNamespace(grid=SimpleNamespace(tp=1, cp=1))
    world = SimpleNamespace(placement=placement, marks=SlowMarks(), groups=None, rank=0)
    return Recorder(world, model), shard  # type: ignore[arg-type]


def test_step_that_fails_is_dropped_without_a_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder_of_one, shard = stand_in(monkeypatch)
    marks = recorder_of_one.world.marks
    with pytest.raises(KeyError, match="what failed"), recorder_of_one.step(1), marks.span("query"):
        # Only looking at it would fail.
        shard.reads.append("rows that are lost")
        raise KeyError("what failed")
    assert (marks.stopped, marks.is_on, shard.reads) == (0, False, None)
    recording = recorder_of_one.take()
    assert (recording.seconds, recording.spans, recording.notes) == ([], [], [])
    assert recording.tables[0].rows_by_reads == []


def test_reads_of_steps_are_added_up_in_the_size_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # No memory holds a number for each row of so large a shard.
    recorder_of_one, shard = stand_in(monkeypatch, num_rows=1 << 60)
    for step, rows in enumerate([[[7, 7, 1 << 50], [3, 7]], [], [[3, 9]]]):
        with recorder_of_one.step(step + 1):
            shard.reads += [torch.tensor(each) for each in rows]
    with recorder_of_one.step(4, reads=False):
        assert shard.reads is None
    # Row 7 was read three times, row 3 twice, two others once.
    for keep in (True, False):
        assert recorder_of_one.take(keep=keep).tables[0].rows_by_reads == [(3, 1), (2, 1), (1, 2)]
    assert recorder_of_one.take().tables[0].rows_by_reads == []


def test_time_of_a_step_is_without_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder_of_one, _ = stand_in(monkeypatch)
    recorder_of_one.world.marks.seconds = 0.5
    with recorder_of_one.step(1), recorder_of_one.world.marks.span("query"):
        pass
    (seconds,) = recorder_of_one.take().seconds
    assert seconds < 0.25


def ceiling_of_copies(run: RunConfig) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """What the ceiling is measured over, and this rank's groups of copies, memory by memory."""
    session = Session(run)
    points = Recorder(session.world, session.model).ceiling()
    assert session.world.groups is not None
    copies = [
        dist.get_process_group_ranks(group.process_group) if group.size > 1 else []
        for group in session.world.groups.copies
    ]
    bringup.tear_down(session.world)
    return [(point.group, point.ranks) for point in points], copies


def test_ceiling_of_copies_is_that_of_the_first_memory_where_memories_lie_on_different_stages(pool: RankPool) -> None:
    # The first memory's tables are on both stages, the second's on the last.
    found = pool.run(4, ceiling_of_copies, toy_run(kind="two", pp=2))
    everyone = [0, 1, 2, 3]
    assert [copies for _, copies in found] == [[everyone, []]] * 2 + [[everyone, [2, 3]]] * 2
    assert all(points == found[0][0] for points, _ in found)
    assert {ranks for group, ranks in found[0][0] if group == "copies"} == {4}


def test_collectives_of_one_rank_or_inside_ours_are_not_marked(pool: RankPool) -> None:
    pool.run(2, check_watching)


def check_watching() -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    pair = dist.new_group([0, 1])
    marks = Marks()
    watched = WatchedCollectives(marks, {id(pair): "tp"})
    ones = torch.ones(4)
    marks.begin_step(1)
    with watched:
        dist.all_reduce(ones, group=alone)
        with marks.span("values", "mp"):
            dist.all_to_all_single(torch.empty(4), torch.ones(4), group=pair)
        dist.all_reduce(torch.ones(3))
        handle = dist.all_reduce(torch.ones(2, dtype=torch.float64), group=pair, async_op=True)
        with marks.span("query"):
            pass
        handle.wait()
        assert handle.is_completed()
    dist.all_reduce(ones, group=pair)
    spans, _ = marks.end_step()
    assert [(span.phase, span.group, span.num_bytes) for span in spans] == [
        ("values", "mp", 0),
        ("all_reduce/world", "world", 12),
        ("query", "", 0),
        ("all_reduce/tp", "tp", 16),
    ]
    asynchronous = spans[-1]
    assert asynchronous.start_ns < spans[2].start_ns
    assert asynchronous.exposed_ns < asynchronous.end_ns - asynchronous.start_ns


def test_coalesced_calls_are_one_and_end_where_they_are_waited_for(pool: RankPool) -> None:
    pool.run(2, check_coalescing)


def check_coalescing() -> None:
    marks, rank = Marks(), dist.get_rank()
    pair = dist.new_group([0, 1])
    tensors = [torch.ones(3), torch.ones(5)]
    marks.begin_step(1)
    with WatchedCollectives(marks, {id(pair): "dp"}):
        with dist._coalescing_manager(pair):
            for tensor in tensors:
                dist.all_reduce(tensor, group=pair)
        with dist._coalescing_manager(pair, async_ops=True) as handle:
            for tensor in tensors:
                dist.all_reduce(tensor, group=pair, async_op=True)
        with marks.span("query"):
            pass
        handle.wait()
        sent, received = torch.full((2,), float(rank)), torch.empty(2)
        operations = [dist.P2POp(dist.isend, sent, 1 - rank, pair), dist.P2POp(dist.irecv, received, 1 - rank, pair)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    spans, _ = marks.end_step()
    # They were summed twice, and each got what the other sent.
    assert all(torch.equal(tensor, torch.full_like(tensor, 4.0)) for tensor in tensors)
    assert received.tolist() == [1.0 - rank] * 2
    assert [(span.phase, span.group, span.num_bytes) for span in spans] == [
        ("all_reduce/dp", "dp", 32),
        ("query", "", 0),
        ("all_reduce/dp", "dp", 32),
        ("send/pp", "pp", 8),
        ("receive/pp", "pp", 8),
    ]
    assert spans[0].exposed_ns == spans[0].end_ns - spans[0].start_ns
    assert spans[2].start_ns < spans[1].start_ns and spans[2].exposed_ns < spans[2].end_ns - spans[1].start_ns


def test_call_that_nobody_waits_for_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Waiting() for _ in operations])
    marks = Marks()
    for _ in range(2):
        marks.begin_step(1)
        with WatchedCollectives(marks, {}) as watched:
            left, waited = dist.batch_isend_irecv([send_op("send"), send_op("recv")])
            with marks.span("query"):
                pass
            waited.wait()
        # Too late: the step is over.
        left.wait()
        assert not watched.open
        spans, _ = marks.end_step()
        # By their ends: it took no time where it began.
        assert [span.phase for span in spans] == ["send/pp", "query", "receive/pp"]
        assert (spans[0].end_ns, spans[0].exposed_ns, spans[0].num_bytes) == (spans[0].start_ns, 0, 8)


def send_op(kind: str) -> SimpleNamespace:
    return SimpleNamespace(op=SimpleNamespace(__name__=f"i{kind}"), tensor=torch.ones(2))


class Waiting:
    """A handle whose wait takes a while."""

    def wait(self) -> None:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("operations", "waited"), [(("send", "recv", "send"), "receive/pp"), (("send",) * 2, "send/pp")]
)
def test_wait_for_a_batch_with_one_handle_counts_once(
    operations: tuple[str, ...], waited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As NCCL answers.
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Waiting()])
    marks = Marks()
    marks.begin_step(1)
    with WatchedCollectives(marks, {}):
        (handle,) = dist.batch_isend_irecv([send_op(kind) for kind in operations])
        handle.wait()
    spans, _ = marks.end_step()
    assert len(spans) == len(operations) and len({span.end_ns for span in spans}) == 1
    exposed = [span for span in spans if span.exposed_ns]
    assert [span.phase for span in exposed] == [waited]
    assert exposed[0].exposed_ns >= 10_000_000
    assert all(span.end_ns - span.start_ns >= 10_000_000 and span.num_bytes == 8 for span in spans)


def test_recording_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    recording = Recording(
        rank=3,
        seconds=[0.5, 0.25],
        mark_us=0.75,
        group_sizes={"mp": 2},
        spans=[Span(1, 2, 0, "values", "mp", 5, 9, 4, 8, 16)],
        notes=[Note(1, 2, 0, "owned", (4, 1, 3))],
        tables=[ShardReads(table="memory.values", num_rows=9, rows_by_reads=[(5, 1), (1, 3)])],
    )
    recording.save(tmp_path)
    assert Recording.load(tmp_path, 3) == recording
    assert dataclasses.replace(recording, rank=2) != recording
