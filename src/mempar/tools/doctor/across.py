"""All nodes of a launch looked at: each by itself, then their collectives together.

Every node runs `node.py` behind a connection; what it says, or does not, is turned into findings here. Whatever ends
this, the connections end, and with them the nodes' processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.launch.words import BEAT, BEAT_SECONDS, KILL
from mempar.tools.doctor.node import END
from mempar.tools.doctor.node_commands import NodeCommand
from mempar.tools.doctor.wire import (
    ANSWER,
    ENDED,
    FAILED,
    HELLO,
    Answer,
    Inbox,
    Question,
    Trial,
    read_answer,
    write_question,
    write_trial,
)
from mempar.tools.launch.connection import Connection

# For Python to start on a node, from a cold file system; and to look at everything, of which the driver takes longest.
HELLO_SECONDS, ANSWER_SECONDS = 90.0, 240.0
# For nodes to leave when they are told to, and for srun to take back what it asked for.
_LEAVE_SECONDS = 8.0
_POLL_SECONDS = 0.1


@dataclass(kw_only=True)
class NodeState:
    """What is known of a node.

    Attributes:
        node_rank: its number.
        name: as the command or it gives it.
        said: values of its messages, by their kinds.
        problem: why it does not answer; empty while it may.
        status: exit status of the command that reached it; None while it runs.
    """

    node_rank: int
    name: str
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""
    status: int | None = None


class _Line:
    """A connection, the nodes behind it, and what else came out of it."""

    def __init__(self, command: NodeCommand, hear: Callable[[str], bool]) -> None:
        self.command, self._hear_message = command, hear
        self.last_text = ""
        try:
            self.connection = Connection(command.words, self._hear)
        except OSError as error:
            raise ConfigError(
                f"'{command.words[0]}' cannot be run ({error.strerror}); nodes are reached through it; install it, or "
                "go where it is."
            ) from None

    def _hear(self, line: str) -> None:
        if not self._hear_message(line) and (text := "".join(sign for sign in line.strip() if sign.isprintable())):
            self.last_text = text[:300]


class Nodes:
    """All nodes, from `with Nodes(...)` on until its end.

    Attributes:
        states: of them, in their order.
    """

    def __init__(self, commands: Sequence[NodeCommand], names: Sequence[str], wait_seconds: float) -> None:
        """Describe them.

        Args:
            commands: that reach them.
            names: of them, as far as they are known.
            wait_seconds: for a connection, beside what a node takes to begin.
        """
        self.states = [NodeState(node_rank=rank, name=name) for rank, name in enumerate(names)]
        self._commands, self._hello_seconds = commands, wait_seconds + HELLO_SECONDS
        self._inboxes = [Inbox() for _ in commands]
        self._lines: list[_Line] = []
        self._beaten = 0.0
        self._first_hello = 0.0
        self._hello_at: dict[int, float] = {}

    def __enter__(self) -> "Nodes":
        self._began = time.monotonic()
        try:
            for command, inbox in zip(self._commands, self._inboxes, strict=True):
                self._lines.append(_Line(command, lambda line, inbox=inbox: self._hear(inbox, line)))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def ask(self, question: Question) -> list[Answer]:
        """Let every node look; returns the answers of those that have one, the others have a problem."""
        self._tell(write_question(question))
        while any(not state.problem and ANSWER not in state.said for state in self.states):
            self.look_after()
            now = time.monotonic()
            for line in self._lines:
                for state in self._behind(line):
                    state.problem = state.problem or self._late(state, line, now)
            time.sleep(_POLL_SECONDS)
        return [read_answer(state.said[ANSWER]) for state in self.states if not state.problem]

    def start_trial(self, trial: Trial) -> None:
        """Let all nodes start their ranks; `has_trial_ended` says when it is over."""
        self._tell(write_trial(trial))

    def has_trial_ended(self) -> bool:
        """Whether all nodes are done, or one cannot be any more."""
        self.look_after()
        troubled = any(state.problem or state.said.get(ENDED, {}).get("error") for state in self.states)
        return troubled or all(ENDED in state.said for state in self.states)

    def look_after(self) -> None:
        """Beat, and see which nodes are lost."""
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._tell(BEAT)
        for line in self._lines:
            if not line.connection.has_ended():
                continue
            for state in self._behind(line):
                state.status = line.connection.status
                if not state.problem and FAILED not in state.said and ENDED not in state.said:
                    state.problem = line.last_text or f"{line.command.words[0]} ended with status {state.status}"
        for state in self.states:
            if not state.problem and FAILED in state.said:
                state.problem = state.said[FAILED]["text"]

    def _late(self, state: NodeState, line: _Line, now: float) -> str:
        """What to say of a node that takes too long; nothing while it may still answer."""
        if ANSWER in state.said:
            return ""
        if HELLO in state.said:
            seconds = ANSWER_SECONDS
            began = self._hello_at[state.node_rank]
        elif line.command.is_queued and not self._first_hello:
            return ""
        else:
            seconds, began = self._hello_seconds, max(self._began, self._first_hello if line.command.is_queued else 0.0)
        said = f"; the last that was heard: {line.last_text}" if line.last_text else ""
        return f"no answer within {seconds:g} s{said}" if now - began > seconds else ""

    def _behind(self, line: _Line) -> list[NodeState]:
        return [self.states[rank] for rank in line.command.node_ranks]

    def _hear(self, inbox: Inbox, line: str) -> bool:
        """Take a line, in a reader's thread; whether it is a part of a message."""
        try:
            message = inbox.hear(line)
        except (ValueError, TypeError):
            return False
        if message is None:
            return True
        node_rank, kind, values = message
        if not 0 <= node_rank < len(self.states):
            return False
        state = self.states[node_rank]
        if kind == HELLO:
            state.name = values["name"]
            self._hello_at[node_rank] = time.monotonic()
            self._first_hello = self._first_hello or self._hello_at[node_rank]
        state.said[kind] = values
        return True

    def _tell(self, word: str) -> None:
        for line in self._lines:
            line.connection.tell(word)

    def _close(self) -> None:
        done = all(ENDED in state.said for state in self.states)
        self._tell(END if done else KILL)
        self._wait_for_ends()
        for line in self._lines:
            # Told by SIGTERM srun takes back what it asked for.
            if line.connection.status is None:
                line.connection.process.terminate()
        self._wait_for_ends()
        for line in self._lines:
            line.connection.close()

    def _wait_for_ends(self) -> None:
        until = time.monotonic() + _LEAVE_SECONDS
        while any(line.connection.status is None for line in self._lines) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
