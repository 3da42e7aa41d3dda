"""The order in which a pipeline stage computes, sends and receives: megatron's schedules, written out.

Without virtual stages 1F1B: stage i of p runs p - i - 1 micro-batches ahead, then one forward and one backward pass in
turns, and waits for each of its sends and receipts before it goes on. Interleaved over v chunks it runs
2 (p - i - 1) + (v - 1) p passes ahead; micro-batches go through the chunks in groups of p. There sends and receipts
beside the passes of the steady state are not waited for before they are needed (`overlap_p2p_comm`, which the engine
sets), those before and after it are. Follows megatron-core 0.16, core/pipeline_parallel/schedules.py; without a
pipeline each backward pass follows its forward pass.
"""

from dataclasses import dataclass
from typing import Literal

# To and from the next stage, to and from the previous one; the last stage's next is the first.
MessageKind = Literal["send_next", "recv_next", "send_prev", "recv_prev"]


@dataclass(frozen=True)
class Pass:
    """A chunk computes one micro-batch.

    Attributes:
        is_forward: whether it is the forward pass.
        chunk: virtual stage on this stage.
        micro_batch: its number.
    """

    is_forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Post:
    """A message is offered or asked for; the `number`-th of its kind on this stage. What follows need not wait."""

    kind: MessageKind
    number: int


@dataclass(frozen=True)
class Wait:
    """The stage goes on when the message has arrived, or has been taken."""

    kind: MessageKind
    number: int


Instruction = Pass | Post | Wait


class _Writer:
    """Collects a stage's instructions and numbers its messages."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self._posted: dict[MessageKind, int] = {}

    def compute(self, is_forward: bool, chunk: int, micro_batch: int) -> None:
        self.instructions.append(Pass(is_forward, chunk, micro_batch))

    def post(self, kind: MessageKind, wanted: bool = True) -> Wait | None:
        """Post a message if it is wanted; returns what waits for it."""
        if not wanted:
            return None
        number = self._posted.get(kind, 0)
        self._posted[kind] = number + 1
        self.instructions.append(Post(kind, number))
        return Wait(kind, number)

    def wait(self, *waits: Wait | None) -> None:
        self.instructions += [wait for wait in waits if wait is not None]

    def exchange(self, **wanted: bool) -> None:
        """Post messages together and wait for all of them."""
        kinds: tuple[MessageKind, ...] = ("send_prev", "recv_prev", "send_next", "recv_next")
        self.wait(*[self.post(kind, wanted.get(kind, False)) for kind in kinds])


def instructions_of(stage: int, *, pp: int, vpp: int, num_micro_batches: int) -> list[Instruction]:
    """What one stage does in a step.

    Args:
        stage: the pipeline stage.
        pp: stages p.
        vpp: chunks v of each; beyond one, p divides the micro-batches.
        num_micro_batches: of a step.
    """
    writer = _Writer()
    if pp == 1:
        for micro_batch in range(num_micro_batches):
            writer.compute(True, 0, micro_batch)
            writer.compute(False, 0, micro_batch)
    elif vpp == 1:
        _one_forward_one_backward(writer, stage, pp, num_micro_batches)
    else:
        _Interleaved(writer, stage, pp, vpp, num_micro_batches).write()
    return writer.instructions


def _one_forward_one_backward(writer: _Writer, stage: int, pp: int, count: int) -> None:
    has_prev, has_next = stage > 0, stage < pp - 1
    ahead = min(pp - stage - 1, count)
    for micro_batch in range(ahead):
        writer.exchange(recv_prev=has_prev)
        writer.compute(True, 0, micro_batch)
        writer.exchange(send_next=has_next)
    if count > ahead:
        writer.exchange(recv_prev=has_prev)
    for place in range(count - ahead):
        writer.compute(True, 0, place + ahead)
        writer.exchange(send_next=has_next, recv_next=has_next)
        writer.compute(False, 0, place)
        writer.exchange(send_prev=has_prev, recv_prev=has_prev and place < count - ahead - 1)
    for micro_batch in range(count - ahead, count):
        writer.exchange(recv_next=has_next)
        writer.compute(False, 0, micro_batch)
        writer.exchange(send_prev=has_prev)


class _Interleaved:
    """Writes the schedule of several chunks a stage."""

    def __init__(self, writer: _Writer, stage: int, pp: int, vpp: int, count: int) -> None:
        assert count % pp == 0, "interleaved stages take multiples of pp micro-batches"
        self.writer, self.pp, self.vpp = writer, pp, vpp
        self.is_first, self.is_last = stage == 0, stage == pp - 1
        self.order = [
            (chunk, micro_batch)
            for first in range(0, count, pp)
            for chunk in range(vpp)
            for micro_batch in range(first, first + pp)
        ]
        self.ahead = min(2 * (pp - stage - 1) + (vpp - 1) * pp, len(self.order))
        # Receipts that were asked for and not yet waited for; the latest message sent each way.
        self.from_prev: list[Wait] = []
        self.from_next: list[Wait] = []
        self.to_next: Wait | None = None
        self.to_prev: Wait | None = None

    def write(self) -> None:
        total, writer = len(self.order), self.writer
        writer.exchange(recv_prev=not self.is_first)
        for place in range(self.ahead):
            self._compute(True, place)
            receives = self._receives(True, place) and place < total - 1
            writer.exchange(send_next=self._sends(True, place), recv_prev=receives)
        if 0 < self.ahead < total and not self.is_last:
            self._keep(self.from_next, writer.post("recv_next"))
        for place in range(self.ahead, total):
            self._overlapped(place)
        if self.ahead == total:
            writer.exchange(recv_next=not self.is_last)
        for place in range(total - self.ahead, total):
            if place and self._needs_message(False, place):
                self._wait_first(self.from_next)
            self._compute(False, place)
            receives = self._receives(False, place) and place < total - 1
            writer.exchange(send_prev=self._sends(False, place), recv_next=receives)
        writer.wait(self.to_prev)
        assert not self.from_prev and not self.from_next, "a message was asked for and never waited for"

    def _overlapped(self, place: int) -> None:
        """One forward and one backward pass; their messages are waited for when they are needed."""
        writer, behind = self.writer, place - self.ahead
        if self._needs_message(True, place):
            self._wait_first(self.from_prev)
        self._compute(True, place)
        sent = writer.post("send_next", self._sends(True, place))
        self._keep(
            self.from_prev, writer.post("recv_prev", self._receives(True, place) and place < len(self.order) - 1)
        )
        writer.wait(self.to_next)
        self.to_next = sent
        if self._needs_message(False, behind):
            self._wait_first(self.from_next)
        self._compute(False, behind)
        sent = writer.post("send_prev", self._sends(False, behind))
        self._keep(self.from_next, writer.post("recv_next", self._receives(False, behind)))
        writer.wait(self.to_prev)
        self.to_prev = sent

    def _compute(self, is_forward: bool, place: int) -> None:
        self.writer.compute(is_forward, self._chunk(is_forward, place), self.order[place][1])

    def _chunk(self, is_forward: bool, place: int) -> int:
        chunk = self.order[place % len(self.order)][0]
        return chunk if is_forward else self.vpp - 1 - chunk

    def _sends(self, is_forward: bool, place: int) -> bool:
        """Whether what a pass makes goes to another stage: not beyond the ends of the model."""
        is_end, end = (self.is_last, self.vpp - 1) if is_forward else (self.is_first, 0)
        return not (is_end and self._chunk(is_forward, place) == end)

    def _needs_message(self, is_forward: bool, place: int) -> bool:
        """Whether a pass needs what another stage made."""
        is_end, end = (self.is_first, 0) if is_forward else (self.is_last, self.vpp - 1)
        return not (is_end and self._chunk(is_forward, place) == end)

    def _receives(self, is_forward: bool, place: int) -> bool:
        """Whether a message is asked for after a pass: the leading stage asks for what the ending one has made."""
        leads, end = (self.is_first, self.vpp - 1) if is_forward else (self.is_last, 0)
        if not leads:
            return True
        made = place - (self.pp - 1)
        return made >= 0 and self._chunk(is_forward, made) != end

    def _keep(self, waits: list[Wait], wait: Wait | None) -> None:
        waits += [] if wait is None else [wait]

    def _wait_first(self, waits: list[Wait]) -> None:
        if waits:
            self.writer.wait(waits.pop(0))
