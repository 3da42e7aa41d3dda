"""The launcher's eyes and hands: watches the ranks of this host, passes on signals, ends what does not end itself.

A thread beside whatever waits for the ranks (torchrun's agent, or a plain wait). It knows the ranks from their signs
of life (heartbeat.py), looks at exit statuses without collecting them, and kills:

- what is still starting when the launcher is told to stop: there is nothing to save yet;
- ranks that outlive another one's failure, on whichever node, after time to fail by themselves, by which hanging ones
  are told;
- all, when one gave no sign of life for longer than a collective waits, and at the second SIGINT.

The ranks must be children of this process. torchrun's agent alone would wait 30 seconds for a hanging rank.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mempar.runtime.launch.endings import RankEnd, is_own_fault, read_failures
from mempar.runtime.launch.heartbeat import Phase, Sign, read_signs, stack_of
from mempar.runtime.launch.node_ends import NodeEnd, read_node_ends, record_node_end
from mempar.runtime.launch.nodes import Node

_POLL_SECONDS = 0.2
# What ranks get to say how they fail: when the cause is known, and when those that still run are the suspects: others
# began to wait at most a step later than the first one that gave up.
_GRACE_SECONDS = 2.0
_SUSPECT_SECONDS = 10.0
# How much longer than a collective waits a sign of life may stay away before the launcher acts itself.
_SLACK_SECONDS = 10.0
# For writing where a rank hangs.
_STACK_SECONDS = 0.5
# What the head waits for other nodes to say how their ranks ended: they kill and write within that.
_OTHERS_SECONDS = 15.0


class Supervisor:
    """Watches the ranks that this process starts.

    Attributes:
        stopped_early: a wish to stop came before any step; the ranks were killed, or died of it.
    """

    def __init__(self, directory: Path, timeout: float, node: Node) -> None:
        """Describe it; `start` begins.

        Args:
            directory: of the ranks' signs of life.
            timeout: seconds that a collective waits.
            node: this one.
        """
        self.stopped_early = False
        self._directory, self._timeout, self._node = directory, timeout, node
        self._host = node.name
        self._wish, self._at_once = "", False
        self._told: set[int] = set()
        # By process.
        self._signs: dict[int, Sign] = {}
        self._ends: dict[int, RankEnd] = {}
        self._killed: dict[int, bool] = {}
        self._failed_at = 0.0
        self._stop_after = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def wish(self, reason: str) -> None:
        """Pass on a signal, by its name; may be called in a signal's handler."""
        self._wish = self._wish or reason

    def end_now(self) -> None:
        """Kill the ranks; may be called in a signal's handler."""
        self._at_once = True

    @property
    def wished(self) -> str:
        """The signal that was passed on first."""
        return self._wish

    @property
    def is_told_to_end(self) -> bool:
        """Whether anybody asked for an end."""
        return bool(self._wish) or self._at_once

    @property
    def interrupted(self) -> bool:
        """Whether the ranks were killed because somebody insisted."""
        return self._at_once

    def finish(self, statuses: dict[int, int]) -> list[RankEnd]:
        """Stop watching; all ranks have ended.

        Args:
            statuses: exit statuses by rank, as the agent collected them; for ranks that were not seen to end.

        Returns:
            How all ranks of which anything is known ended, those of other hosts included.
        """
        self._done.set()
        self._thread.join()
        self._look()
        ends = self._own_ends(statuses)
        if self._node.num_nodes > 1:
            early = (self._wish or "SIGTERM") if self.stopped_early else ""
            failed = any(end.has_failed for end in ends)
            # Of a good end nobody waits for news, and the head deletes their directory.
            if early or failed:
                own = NodeEnd(node_rank=self._node.node_rank, ends=ends, stopped_early=early)
                record_node_end(self._directory, own)
            ends += self._ends_elsewhere(failed=failed)
        return ends

    def _own_ends(self, statuses: dict[int, int]) -> list[RankEnd]:
        failures = read_failures(self._directory)
        ends = []
        for sign in read_signs(self._directory, self._host):
            end = self._ends.get(sign.pid) or self._end_of(sign, None, time.time())
            status = statuses.get(sign.rank) if end.status is None else end.status
            ends.append(replace(end, status=status, failure=failures.get(end.rank)))
        seen = {end.rank for end in ends}
        ends += [
            RankEnd(rank=rank, status=status, ended_at=time.time())
            for rank, status in statuses.items()
            if rank not in seen and -1 not in seen
        ]
        return ends

    def _ends_elsewhere(self, *, failed: bool) -> list[RankEnd]:
        """How the ranks of other nodes ended, from what their launchers say or, without that, from their last signs."""
        until = time.monotonic() + (_OTHERS_SECONDS if failed and self._node.is_head else 0.0)
        while len(told := read_node_ends(self._directory)) < self._node.num_nodes and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        self._heed(told.values())
        failures = read_failures(self._directory)
        known = {end.rank: end for number, node in told.items() if number != self._node.node_rank for end in node.ends}
        signs = [sign for sign in read_signs(self._directory) if sign.host != self._host]
        # What a launcher saw of its own ranks is newer than what has come here of their signs.
        unknown = [self._end_of(sign, None, time.time()) for sign in signs if sign.rank not in known]
        return [replace(end, failure=failures.get(end.rank)) for end in (*known.values(), *unknown)]

    @property
    def failed_at(self) -> float:
        """When the first failure was seen, in seconds since the epoch."""
        return self._failed_at or time.time()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        now = time.time()
        self._heed(self._nodes_elsewhere())
        self._signs = {sign.pid: sign for sign in read_signs(self._directory, self._host)}
        for sign in self._signs.values():
            self._collect(sign, now)
        running = [sign for sign in self._signs.values() if sign.pid not in self._ends]
        if self._at_once:
            self._kill(running, stacks=False)
        elif self._wish:
            self._pass_on(running)
        self._end_failed(running, now)
        self._end_silent(running, now)

    def _collect(self, sign: Sign, now: float) -> None:
        """Note how a rank ended; its parent's wait still gets the status."""
        if sign.pid in self._ends:
            return
        try:
            result = os.waitid(os.P_PID, sign.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # The agent was faster; `finish` is told the status of those that failed.
            self._ends[sign.pid] = self._end_of(sign, None, now)
            return
        if result is None:
            return
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self._ends[sign.pid] = self._end_of(sign, status, now)

    def _end_of(self, sign: Sign, status: int | None, now: float) -> RankEnd:
        killed = sign.host == self._host and sign.pid in self._killed
        return RankEnd(
            rank=sign.rank,
            status=status,
            sign=sign,
            ended_at=now,
            killed=killed,
            stopped=killed and self._killed[sign.pid],
            stack=stack_of(self._directory, sign) if killed else "",
        )

    def _heed(self, nodes: Iterable[NodeEnd]) -> None:
        """Take over that a node's ranks were ended before the first step, which none has made without them."""
        for node in nodes:
            if node.stopped_early:
                # Its agent alone was told to end, or was told first.
                self.wish(node.stopped_early)
                self.stopped_early = True

    def _pass_on(self, running: list[Sign]) -> None:
        """Tell the ranks to stop; those that have not begun are killed."""
        starting = all(sign.phase == Phase.STARTING for sign in self._signs.values())
        if starting or self.stopped_early:
            self.stopped_early = True
            self._kill(running, stacks=False)
            return
        for sign in running:
            if sign.pid not in self._told:
                self._told.add(sign.pid)
                _send(sign.pid, signal.Signals[self._wish])

    def _end_failed(self, running: list[Sign], now: float) -> None:
        """Once a rank failed, here or on another node, end those that go on without it."""
        if not running or not (self._ends or self._node.num_nodes > 1):
            return
        failures = read_failures(self._directory)
        elsewhere = [end for node in self._nodes_elsewhere() for end in node.ends]
        ends = [replace(end, failure=failures.get(end.rank)) for end in (*self._ends.values(), *elsewhere)]
        failed = [end for end in ends if end.has_failed]
        if not failed:
            return
        self._failed_at = self._failed_at or now
        known = any(is_own_fault(end, self._timeout) for end in failed)
        grace = _GRACE_SECONDS if known or all(_is_stopped(sign.pid) for sign in running) else _SUSPECT_SECONDS
        if now - self._failed_at > grace:
            self._kill(running, stacks=not known)

    def _nodes_elsewhere(self) -> list[NodeEnd]:
        if self._node.num_nodes == 1:
            return []
        told = read_node_ends(self._directory)
        return [node for number, node in told.items() if number != self._node.node_rank]

    def _end_silent(self, running: list[Sign], now: float) -> None:
        """End all when one rank gave no sign for longer than a collective would have waited for it."""
        longest = self._timeout + _SLACK_SECONDS
        if any(now - sign.time > longest and (sign.phase.is_lively or _is_stopped(sign.pid)) for sign in running):
            self._failed_at = self._failed_at or now
            self._kill(running, stacks=True)

    def _kill(self, running: list[Sign], *, stacks: bool) -> None:
        fresh = [sign for sign in running if sign.pid not in self._killed]
        for sign in fresh:
            self._killed[sign.pid] = _is_stopped(sign.pid)
        if stacks and fresh:
            for sign in fresh:
                _send(sign.pid, signal.SIGUSR1)
            time.sleep(_STACK_SECONDS)
        for sign in fresh:
            _send(sign.pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a child that has not been collected, so that its number is still its own."""
    try:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(pid, number)
    except (ChildProcessError, ProcessLookupError):
        pass


def _is_stopped(pid: int) -> bool:
    try:
        # The state follows the name, which is in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
