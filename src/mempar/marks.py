"""Marks of time around the phases of a step: what took how long, for whom, and how many bytes went out meanwhile.

Memory layers, exchanges and optimizers hold the `Marks` of their rank and name their phases; nothing is recorded, and
next to nothing is spent, unless they are turned on for a step. On a CPU a mark is a reading of the monotonic clock; on
a GPU it is an event on the current stream, and nobody waits before the step is over. Marks change no number: phases of
the backward pass are told by hooks on tensors, of which the autograd graph knows nothing.

Bytes are those of the tensors that were handed to collectives; nothing here knows what they ought to be.
"""

import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """One call of one phase on one rank.

    Times are nanoseconds of one clock for all ranks of a machine; the recording's first span need not begin at 0.

    Attributes:
        step: number of the training step, from 1.
        layer: 0-based number of the block; -1 outside memory layers.
        micro_batch: 0-based number in the step; -1 outside memory layers.
        phase: `query`, `topk`, ..., `values`, `row_update`; megatron's collectives are `all_reduce/tp` and the like.
        group: whose collective it is (`mp`, `mp_inside`, `copies`, `tp`, `dp`, ...); empty for computation.
        start_ns: when it began.
        end_ns: when it was done; of an asynchronous collective, when the wait for it was over, or when it began if
            nobody waited.
        exposed_ns: of a collective, how long this rank waited for it; 0 for computation.
        num_bytes: of a memory collective what this rank sent to others, of megatron's the size of the message.
        message_bytes: of the tensors handed to the collective, what stays here included.
    """

    step: int
    layer: int
    micro_batch: int
    phase: str
    group: str
    start_ns: int
    end_ns: int
    exposed_ns: int = 0
    num_bytes: int = 0
    message_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """Counts that a rank saw on the way: of tokens, of entries. A pass that is repeated in backward notes nothing.

    Attributes:
        step: see `Span`.
        layer: see `Span`.
        micro_batch: see `Span`.
        name: of what was counted.
        counts: the numbers.
    """

    step: int
    layer: int
    micro_batch: int
    name: str
    counts: tuple[int, ...]


class Clock(Protocol):
    """Tells moments now, and what they were when the step is over."""

    def start(self) -> None:
        """Begin a step."""
        ...

    def now(self) -> Any:
        """The present moment of what computes."""
        ...

    def wait(self) -> None:
        """Wait until all moments so far have come."""
        ...

    def nanoseconds(self, moments: list[Any]) -> list[int]:
        """When moments since `start` were; `wait` was called after the last."""
        ...


class HostClock:
    """The monotonic clock, which all processes of a machine share."""

    def start(self) -> None:
        """See `Clock.start`."""

    def now(self) -> int:
        """See `Clock.now`."""
        return time.perf_counter_ns()

    def wait(self) -> None:
        """See `Clock.wait`."""

    def nanoseconds(self, moments: list[Any]) -> list[int]:
        """See `Clock.nanoseconds`."""
        return moments


class CudaClock:
    """Events on the current stream, in the time of the host's clock."""

    def start(self) -> None:
        """See `Clock.start`; waits for the device, so that its time can be told by the host's."""
        import torch

        # Looked up once: this is the package's one clock on a device.
        self._event, self._synchronize = torch.cuda.Event, torch.cuda.synchronize
        self._synchronize()
        self._base = self.now()
        self._synchronize()
        self._base_ns = time.perf_counter_ns()

    def now(self) -> Any:
        """See `Clock.now`."""
        event = self._event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """See `Clock.wait`."""
        self._synchronize()

    def nanoseconds(self, moments: list[Any]) -> list[int]:
        """See `Clock.nanoseconds`."""
        return [self._base_ns + round(self._base.elapsed_time(moment) * 1e6) for moment in moments]


class Call:
    """A phase that goes on; a context manager."""

    __slots__ = ("_group", "_marks", "_message_bytes", "_num_bytes", "_phase", "_start")

    def __init__(self, marks: "Marks", phase: str, group: str, num_bytes: int, message_bytes: int) -> None:
        self._marks, self._phase, self._group = marks, phase, group
        self._num_bytes, self._message_bytes = num_bytes, message_bytes
        self._start: Any = None

    def __enter__(self) -> "Call":
        if self._group:
            self._marks.in_collective += 1
        self._start = self._marks.clock.now()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._group:
            self._marks.in_collective -= 1
        self.end(self._start)

    def begin(self, at: Any = None) -> "Call":
        """Begin a collective that others may overlap, now or at a moment that has been; `end` ends it."""
        self._start = self._marks.clock.now() if at is None else at
        return self

    def end(self, waited_since: Any, at: Any = None) -> None:
        """Note that it is over.

        Args:
            waited_since: moment since when this rank has waited for it.
            at: moment when it was; now unless given.
        """
        marks = self._marks
        if marks.is_on:
            moments = (self._start, marks.clock.now() if at is None else at, waited_since)
            marks.calls.append((marks.place, self._phase, self._group, moments, self._num_bytes, self._message_bytes))

    def end_unseen(self) -> None:
        """Note that it was called. When it was over is not known, as nobody waited for it: it takes no time."""
        self.end(self._start, at=self._start)


# Outside memory layers: block, micro-batch, whether a pass is repeated.
NOWHERE = (-1, -1, False)


class Marks:
    """The marks of one rank.

    Attributes:
        clock: of what computes.
        is_on: whether this step is recorded.
        place: block, micro-batch, and whether its forward pass is being repeated.
        in_collective: whether a collective of ours goes on: what it calls is not counted again.
        calls: what was recorded since `begin_step`.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or HostClock()
        self.is_on = False
        self.place = NOWHERE
        self.in_collective = 0
        self.calls: list[tuple[Any, ...]] = []
        self._step = 0
        self._notes: list[Note] = []
        self._passes: Counter[tuple[int, bool]] = Counter()
        self._backward: tuple[str, Any] | None = None
        self._nothing = nullcontext()

    def begin_step(self, step: int) -> None:
        """Turn the marks on.

        Args:
            step: its number, from 1.
        """
        self.calls, self._notes, self._passes = [], [], Counter()
        self._step, self.place, self._backward, self.in_collective = step, NOWHERE, None, 0
        self.clock.start()
        self.is_on = True

    def end_step(self) -> tuple[list[Span], list[Note]]:
        """Turn them off; returns what was recorded: `stop` and `collect`."""
        self.stop()
        return self.collect()

    def stop(self) -> None:
        """Turn them off, and wait for the device: what was recorded is over then."""
        self.is_on = False
        self.clock.wait()

    def drop(self) -> None:
        """Turn them off and forget what was recorded, without a wait: the device may be what failed."""
        self.is_on = False
        self.calls, self._notes, self._backward, self.place = [], [], None, NOWHERE

    def collect(self) -> tuple[list[Span], list[Note]]:
        """Return what was recorded of the step that was stopped, spans in the order in which they ended."""
        times = self.clock.nanoseconds([moment for call in self.calls for moment in call[3]])
        spans = []
        for number, ((layer, micro_batch, _), phase, group, _, *sizes) in enumerate(self.calls):
            start, end, since = times[3 * number : 3 * number + 3]
            exposed = end - since if group else 0
            spans.append(Span(self._step, layer, micro_batch, phase, group, start, end, exposed, *sizes))
        # What nobody waited for is noted last, and takes no time where it began.
        spans.sort(key=lambda span: span.end_ns)
        notes = self._notes
        self.calls, self._notes = [], []
        return spans, notes

    def span(
        self, phase: str, group: str = "", num_bytes: int = 0, message_bytes: int = 0
    ) -> AbstractContextManager[Any]:
        """Mark what is done inside the context.

        Args:
            phase: its name.
            group: of a collective.
            num_bytes: that this rank sends to others.
            message_bytes: of the tensors handed over.
        """
        if not self.is_on:
            return self._nothing
        return self.call(phase, group, num_bytes, message_bytes)

    def call(self, phase: str, group: str, num_bytes: int, message_bytes: int) -> Call:
        """A call to be begun and ended by hand; what there is to `span`."""
        return Call(self, phase, group, num_bytes, message_bytes)

    def enter(self, layer: int, *, again: bool) -> None:
        """Say which block's memory layer is computed next; micro-batches are counted in the order of its passes."""
        if self.is_on:
            number = self._passes[layer, again]
            self._passes[layer, again] += 1
            self.place = (layer, number, again)

    def leave(self) -> None:
        """Say that the memory layer is through with this pass."""
        self.place = NOWHERE

    def note(self, name: str, counts: list[int]) -> None:
        """Note counts of this place."""
        if self.is_on and not self.place[2]:
            layer, micro_batch, _ = self.place
            self._notes.append(Note(self._step, layer, micro_batch, name, tuple(counts)))

    def backward_of(self, tensor: Any, phase: str) -> None:
        """Let the backward pass, when it comes to a tensor's gradient, end its phase and begin another.

        Args:
            tensor: made inside the layer that was entered.
            phase: what begins; empty for what has marks of its own.
        """
        if not self.is_on or not tensor.requires_grad:
            return
        layer, micro_batch, _ = self.place
        place = (layer, micro_batch, False)

        def arrive(gradient: Any) -> None:
            self._turn(place, phase)

        tensor.register_hook(arrive)

    def backward_ends_after(self, tensor: Any) -> None:
        """Let the backward pass end its phase, and leave the layer, when a tensor's own node is through."""
        if not self.is_on or tensor.grad_fn is None:
            return

        def through(*gradients: Any) -> None:
            self._turn(NOWHERE, "")

        tensor.grad_fn.register_hook(through)

    def cost_us(self, num_calls: int = 200, attempts: int = 10) -> float:
        """Microseconds that a mark takes on the host; the marks must be off."""
        trial, taken = Marks(self.clock), []
        for _ in range(attempts):
            trial.begin_step(0)
            since = time.perf_counter_ns()
            for _ in range(num_calls):
                with trial.span("", "mp"):
                    pass
            taken.append(time.perf_counter_ns() - since)
            trial.end_step()
        # The best attempt is the program's; in the others the machine was busy.
        return min(taken) / num_calls / 1e3

    def _turn(self, place: tuple[int, int, bool], phase: str) -> None:
        if not self.is_on:
            return
        moment = self.clock.now()
        if self._backward is not None:
            ended, since = self._backward
            self.calls.append((self.place, ended, "", (since, moment, moment), 0, 0))
        self._backward = (phase, moment) if phase else None
        self.place = place
