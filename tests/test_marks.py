"""Marks of time: off they cost next to nothing and leave nothing behind, on they say what took how long."""

import time
from typing import Any

import pytest
import torch

from mempar.marks import CudaClock, Marks, Note, Span


class CountingClock:
    """Every look is a nanosecond later."""

    def __init__(self) -> None:
        self.moment, self.starts, self.waits = 0, 0, 0

    def start(self) -> None:
        self.starts += 1

    def now(self) -> int:
        self.moment += 1
        return self.moment

    def wait(self) -> None:
        self.waits += 1

    def nanoseconds(self, moments: list[Any]) -> list[int]:
        return moments


def test_marks_that_are_off_record_nothing_and_do_not_look_at_the_clock() -> None:
    clock = CountingClock()
    marks = Marks(clock)
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    marks.enter(3, again=False)
    with marks.span("query"), marks.span("values", "mp", 4, 8):
        marks.backward_of(y, "gate_backward")
        marks.backward_ends_after(y)
    marks.note("owned", [1])
    y.sum().backward()
    assert (clock.moment, clock.starts, marks.calls) == (0, 0, [])
    # No hook is left in the graph either.
    assert not y._backward_hooks


def test_marks_record_phases_with_their_places() -> None:
    marks = Marks(CountingClock())
    marks.begin_step(7)
    with marks.span("row_update"):
        pass
    marks.enter(3, again=False)
    with marks.span("values", "mp", 64, 128):
        marks.note("owned", [5, 2])
    marks.leave()
    marks.enter(3, again=False)
    with marks.span("query"):
        pass
    assert marks.is_on
    spans, notes = marks.end_step()
    assert not marks.is_on
    assert spans == [
        Span(7, -1, -1, "row_update", "", 1, 2),
        Span(7, 3, 0, "values", "mp", 3, 4, 1, 64, 128),
        Span(7, 3, 1, "query", "", 5, 6),
    ]
    assert notes == [Note(7, 3, 0, "owned", (5, 2))]


def test_pass_that_is_repeated_keeps_its_number_and_notes_nothing() -> None:
    marks = Marks(CountingClock())
    marks.begin_step(1)
    for again in (False, False, True, True):
        marks.enter(2, again=again)
        marks.note("owned", [1])
        with marks.span("query"):
            pass
        marks.leave()
    spans, notes = marks.end_step()
    assert [span.micro_batch for span in spans] == [0, 1, 0, 1]
    assert [note.micro_batch for note in notes] == [0, 1]
    marks.begin_step(2)
    marks.enter(2, again=False)
    assert marks.place == (2, 0, False)


def test_step_that_is_stopped_is_collected_later_and_one_that_is_dropped_never() -> None:
    marks = Marks(CountingClock())
    for drop in (True, False):
        marks.begin_step(1)
        marks.enter(2, again=False)
        with marks.span("query"):
            marks.note("owned", [1])
        if drop:
            marks.drop()
            # Nobody waited for what may be broken.
            assert (marks.is_on, marks.clock.waits, marks.collect()) == (False, 0, ([], []))
        else:
            marks.stop()
            assert (marks.is_on, marks.clock.waits) == (False, 1)
    spans, notes = marks.collect()
    assert (len(spans), len(notes), marks.clock.waits) == (1, 1, 1)


def test_asynchronous_collective_is_exposed_only_while_it_is_waited_for() -> None:
    marks = Marks(CountingClock())
    marks.begin_step(1)
    call = marks.call("all_reduce/tp", "tp", 8, 8).begin()
    with marks.span("query"):
        pass
    call.end(marks.clock.now())
    (query, reduce), _ = marks.end_step()
    assert (query.start_ns, query.end_ns, query.exposed_ns) == (2, 3, 0)
    assert (reduce.start_ns, reduce.end_ns, reduce.exposed_ns) == (1, 5, 1)


def test_backward_phases_follow_each_other_and_change_no_gradient() -> None:
    def gradients(marks: Marks) -> list[torch.Tensor]:
        torch.manual_seed(3)
        x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        marks.enter(1, again=False)
        query = x @ weight
        marks.backward_of(query, "query_backward")
        marks.backward_ends_after(query)
        scores = query.softmax(-1)
        marks.backward_of(scores, "topk_backward")
        out = scores * x
        marks.backward_of(out, "gate_backward")
        marks.leave()
        (out.exp().sum() * 2).backward()
        return [x.grad, weight.grad]

    on, off = Marks(CountingClock()), Marks()
    on.begin_step(1)
    marked = gradients(on)
    spans, _ = on.end_step()
    assert all(torch.equal(one, other) for one, other in zip(marked, gradients(off), strict=True))
    assert [(span.phase, span.layer, span.start_ns, span.end_ns) for span in spans] == [
        ("gate_backward", 1, 1, 2),
        ("topk_backward", 1, 2, 3),
        ("query_backward", 1, 3, 4),
    ]
    assert on.place == (-1, -1, False)


def test_backward_of_what_needs_no_gradient_is_not_marked() -> None:
    marks = Marks(CountingClock())
    marks.begin_step(1)
    with torch.no_grad():
        y = torch.ones(2, requires_grad=True) * 2
    marks.backward_of(y, "gate_backward")
    marks.backward_ends_after(y)
    assert marks.end_step() == ([], [])


class FakeEvent:
    """Events are recorded a millisecond after another, and told when the device was waited for."""

    recorded = 0
    waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.moment = FakeEvent.recorded

    def elapsed_time(self, end: "FakeEvent") -> float:
        return float(end.moment - self.moment)

    @staticmethod
    def synchronize() -> None:
        FakeEvent.waits += 1


def test_clock_of_a_device_waits_at_the_ends_of_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", FakeEvent.synchronize)
    marks, before = Marks(CudaClock()), time.perf_counter_ns()
    marks.begin_step(1)
    at_start = FakeEvent.waits
    for _ in range(5):
        with marks.span("values", "mp", 1, 2):
            pass
    assert FakeEvent.waits == at_start
    spans, _ = marks.end_step()
    assert FakeEvent.waits == at_start + 1
    # Two events a span, a millisecond apart, in the host's time.
    assert [span.end_ns - span.start_ns for span in spans] == [1_000_000] * 5
    assert [span.start_ns - spans[0].start_ns for span in spans] == [2_000_000 * number for number in range(5)]
    assert before < spans[0].start_ns - 1_000_000 < time.perf_counter_ns()


def test_cost_of_a_mark_is_a_few_microseconds_and_off_a_fraction_of_one() -> None:
    marks = Marks()
    cost = marks.cost_us()
    assert 0.05 < cost < 50

    def span_us() -> float:
        since = time.perf_counter_ns()
        for _ in range(1000):
            with marks.span("query"):
                pass
        return (time.perf_counter_ns() - since) / 1e6

    # The best of a few attempts is a property of the program.
    assert min(span_us() for _ in range(20)) < min(1.0, cost)
