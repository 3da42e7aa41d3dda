"""The event engine: tasks on streams of ranks and on the links between them, in integers of picoseconds.

A task has a number for each rank of a pipeline stage. What a rank computes follows on what it did before; a collective
begins when the last of its members arrives; a message between stages begins when it is offered and asked for and the
link has carried the one before it. As every stream and every link takes its tasks in an order known beforehand, the
time of each task is a maximum and a sum, and raising no duration can end a step earlier.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Sending stage, receiving stage, whether it goes forward through the model, number among such messages.
MessageKey = tuple[int, int, bool, int]
# Picoseconds: one number, or one for each rank of a stage [n] int64.
Picoseconds = int | np.ndarray

# What a rank's time goes into: it computes; it sends and receives; it waits for members of its own stage; it waits for
# other stages. What is sent while it computes comes on top.
COMPUTE, EXPOSED, WAITING, BUBBLE, OVERLAPPED = "compute", "exposed", "waiting", "bubble", "overlapped"
KINDS = (COMPUTE, EXPOSED, WAITING, BUBBLE, OVERLAPPED)


@dataclass(frozen=True)
class Members:
    """The groups of one kind in a stage: rank `(o * size + m) * inner + i` is member m of group (o, i).

    Attributes:
        outer: o, how often the pattern repeats.
        size: members of a group.
        inner: i, groups whose members alternate; 1 where members are neighbours.
        kind: `tp`, `mp` and the like.
    """

    outer: int
    size: int
    inner: int = 1
    kind: str = ""

    def latest(self, clocks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Find when the last member arrives.

        Args:
            clocks: `[n]` of each stage that takes part; a group has `size` members in each of them.

        Returns:
            `[n]`, when each rank's group is complete, and `[outer, inner]`, who completed it: its member of the first
            stage, then of the next one, and so on.
        """
        cut = [clock.reshape(self.outer, self.size, self.inner) for clock in clocks]
        all_members = cut[0] if len(cut) == 1 else np.concatenate(cut, axis=1)
        last = all_members.argmax(axis=1)
        outer, inner = self._places
        complete = np.empty_like(cut[0])
        complete[...] = all_members[outer, last, inner][:, None]
        return complete.reshape(-1), last.astype(np.int32)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions `[outer, 1]` and `[1, inner]` of all groups."""
        return np.arange(self.outer)[:, None], np.arange(self.inner)[None]

    def rank_of(self, rank: int, place: int) -> tuple[int, int]:
        """(position among the stages, rank in the stage) of the `place`-th member of a rank's group."""
        outer, inner = self.group_of(rank)
        stage, member = divmod(place, self.size)
        return stage, (outer * self.size + member) * self.inner + inner

    def group_of(self, rank: int) -> tuple[int, int]:
        """(o, i) of a rank's group."""
        return rank // (self.size * self.inner), rank % self.inner


@dataclass(frozen=True, slots=True)
class Task:
    """One task on all ranks of a stage.

    Attributes:
        kind: `compute`, `collective`, `message` or `wait`.
        phase: what it is called.
        stages: who takes part; for a message its sender and its receiver.
        duration: of each rank.
        before: the tasks that it follows, by number; -1 for the beginning.
        decided_by: which of them, or of the members, it had to wait for, rank by rank or group by group.
        members: groups of a collective.
    """

    kind: str
    phase: str
    stages: tuple[int, ...]
    duration: Picoseconds
    before: tuple[int, ...]
    decided_by: np.ndarray | None = None
    members: Members | None = None

    def duration_of(self, rank: int) -> int:
        """Picoseconds on one rank."""
        return int(self.duration if isinstance(self.duration, int) else self.duration[rank])


@dataclass(frozen=True, slots=True)
class Span:
    """What a rank that is watched did for a while, waiting included.

    Attributes:
        rank: world rank.
        phase: what it did.
        group: kind of the group that met for it; empty for computing.
        layer: 0-based number of the block, and
        micro_batch: of the micro-batch; -1 outside of passes.
        start: picoseconds from the start of the step.
        end: likewise.
    """

    rank: int
    phase: str
    group: str
    layer: int
    micro_batch: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Side:
    """One end of a message that the other end has not come to yet."""

    stage: int
    clock: np.ndarray
    task: int


@dataclass(frozen=True, slots=True)
class Message:
    """A message on its way: when it begins and ends on each rank `[n]`, and its number among the tasks."""

    phase: str
    start: np.ndarray
    end: np.ndarray
    task: int


class Timeline:
    """Tasks as they are added, and what the ranks' time went into.

    Attributes:
        clocks: `[n] int64` of each stage: when its ranks are done with what was added so far.
        tasks: all tasks in an order in which each follows on those that it waits for.
        last: number of each stage's last task.
        spans: what the watched ranks did.
        place: block and micro-batch that the next tasks belong to; -1 for none.
    """

    def __init__(self, num_stages: int, ranks_per_stage: int, watched: Sequence[int] = ()) -> None:
        """Begin a step.

        Args:
            num_stages: pipeline stages.
            ranks_per_stage: n.
            watched: world ranks of which every task is kept.
        """
        self.num_stages, self.ranks_per_stage = num_stages, ranks_per_stage
        self.clocks = [np.zeros(ranks_per_stage, dtype=np.int64) for _ in range(num_stages)]
        self.tasks: list[Task] = []
        self.last = [-1] * num_stages
        self.spans: list[Span] = []
        self.place: tuple[int, int] = (-1, -1)
        self._watched: dict[int, list[int]] = defaultdict(list)
        for rank in watched:
            self._watched[rank // ranks_per_stage].append(rank % ranks_per_stage)
        self._even: dict[tuple[str, str, int], int] = defaultdict(int)
        self._spent: dict[tuple[str, str, int], np.ndarray] = {}
        self._sides: dict[MessageKey, _Side] = {}
        self._carried: dict[tuple[int, int, bool], Message] = {}
        self._messages: dict[MessageKey, Message] = {}
        # How long each stage has computed so far, and had when it came to a message.
        self._computed: list[Picoseconds] = [0] * num_stages
        self._computed_at: dict[tuple[int, MessageKey], Picoseconds] = {}

    def compute(self, stage: int, phase: str, duration: Picoseconds) -> None:
        """Let the ranks of a stage compute."""
        before = self.clocks[stage]
        self.clocks[stage] = before + duration
        self._add(Task(COMPUTE, phase, (stage,), duration, (self.last[stage],)))
        self._computed[stage] = self._computed[stage] + duration
        self._spend(COMPUTE, phase, stage, duration)
        self._watch(stage, phase, "", before, self.clocks[stage])

    def collective(self, stages: tuple[int, ...], phase: str, members: Members, duration: Picoseconds) -> None:
        """Let groups meet: members wait for the last of theirs, and end together.

        Args:
            stages: who takes part.
            phase: what it is called.
            members: the groups of each of these stages; groups of several stages are joined, in their order.
            duration: once all are there; equal for the members of a group.
        """
        arrived = [self.clocks[stage] for stage in stages]
        complete, last = members.latest(arrived)
        end = complete + duration
        self._add(Task("collective", phase, stages, duration, tuple(self.last[s] for s in stages), last, members))
        waits_for = WAITING if len(stages) == 1 else BUBBLE
        for stage, clock in zip(stages, arrived, strict=True):
            self.clocks[stage] = end
            self._spend(waits_for, phase, stage, complete - clock)
            self._spend(EXPOSED, phase, stage, duration)
            self._watch(stage, phase, members.kind, clock, end)

    def post(self, stage: int, phase: str, key: MessageKey, duration: int) -> None:
        """Offer a message or ask for it: whoever comes second lets it begin.

        Args:
            stage: who says so.
            phase: what it is called.
            key: which message.
            duration: on the link.
        """
        self._computed_at[stage, key] = self._computed[stage]
        mine = _Side(stage, self.clocks[stage], self.last[stage])
        other = self._sides.pop(key, None)
        if other is None:
            self._sides[key] = mine
            return
        earlier = self._carried.get(key[:3])
        starts = [mine.clock, other.clock] + ([] if earlier is None else [earlier.end])
        before = (mine.task, other.task) + (() if earlier is None else (earlier.task,))
        decided_by = np.argmax(starts, axis=0).astype(np.int8)
        start = np.maximum.reduce(starts)
        number = len(self.tasks)
        self.tasks.append(Task("message", phase, key[:2], duration, before, decided_by))
        message = Message(phase=phase, start=start, end=start + duration, task=number)
        self._carried[key[:3]] = self._messages[key] = message

    def has(self, key: MessageKey) -> bool:
        """Whether both ends of a message came to it."""
        return key in self._messages

    def wait(self, stage: int, key: MessageKey) -> None:
        """Let a stage wait for a message that has begun."""
        message, clock = self._messages[key], self.clocks[stage]
        end = np.maximum(clock, message.end)
        blocked, length = end - clock, message.end - message.start
        exposed = np.minimum(blocked, length)
        self.clocks[stage] = end
        before = (self.last[stage], message.task)
        self._add(Task("wait", message.phase, (stage,), 0, before, (blocked > 0).astype(np.int8)))
        self._spend(BUBBLE, message.phase, stage, blocked - exposed)
        self._spend(EXPOSED, message.phase, stage, exposed)
        computed = self._computed[stage] - self._computed_at.pop((stage, key))
        self._spend(OVERLAPPED, message.phase, stage, np.minimum(length - exposed, computed))
        self._watch(stage, message.phase, "pp", clock, end)

    def spent(self, kind: str) -> dict[str, np.ndarray]:
        """Picoseconds `[stages, n]` by phase that went into one of `KINDS`."""
        found: dict[str, np.ndarray] = {}
        for (key, phase, stage), total in self._even.items():
            if key == kind and total:
                self._rows(found, phase)[stage] += total
        for (key, phase, stage), totals in self._spent.items():
            if key == kind and totals.any():
                self._rows(found, phase)[stage] += totals
        return found

    @property
    def end(self) -> int:
        """When the last rank is done: picoseconds."""
        return max(int(clock.max()) for clock in self.clocks)

    def _rows(self, found: dict[str, np.ndarray], phase: str) -> np.ndarray:
        return found.setdefault(phase, np.zeros((self.num_stages, self.ranks_per_stage), dtype=np.int64))

    def _add(self, task: Task) -> None:
        for stage in task.stages:
            self.last[stage] = len(self.tasks)
        self.tasks.append(task)

    def _spend(self, kind: str, phase: str, stage: int, duration: Picoseconds) -> None:
        key = (kind, phase, stage)
        if isinstance(duration, int):
            self._even[key] += duration
        elif key in self._spent:
            self._spent[key] += duration
        else:
            self._spent[key] = duration.astype(np.int64)

    def _watch(self, stage: int, phase: str, group: str, start: np.ndarray, end: np.ndarray) -> None:
        for rank in self._watched.get(stage, ()):
            if end[rank] > start[rank]:
                world_rank = stage * self.ranks_per_stage + rank
                self.spans.append(Span(world_rank, phase, group, *self.place, int(start[rank]), int(end[rank])))
