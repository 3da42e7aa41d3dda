"""Why a run ended: what failing ranks leave behind, and the one message that is made of it.

When one rank goes, the others fail too, in the collective in which they wait for it, and often first. Here causes are
told from consequences: a rank that died or raised an error of its own comes before any that lost a connection; where
all that failed did so waiting, the cause is the rank that did not fail. With NCCL it is the same but for the watchdog,
which aborts (SIGABRT) whoever waits too long (unproved: nothing here has run on a GPU). Nothing here imports torch.
"""

import json
import re
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from mempar.errors import MemparError
from mempar.runtime.launch.heartbeat import Phase, Sign, files_in

_SUFFIX = ".failed.txt"
# Where a rank stands that has not begun.
BEFORE_STEPS = "before the first step"
# Of the time that a collective waits, what an aborted rank must have been silent for to have been waiting.
_WAITED_SHARE = 0.8
# What gloo, NCCL and torch's stores say when another rank is gone or late.
_OF_COLLECTIVES = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|timed? ?out|broken pipe|socket", re.IGNORECASE
)
_RULE = "a run cannot go on without one of its ranks"
_RESUME = "continue from its last checkpoint with --resume"


class RanksFailedError(MemparError):
    """Ranks failed, on whichever node: all nodes know it, and one says it."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a rank that raised says of it.

    Attributes:
        kind: `told` for a MemparError, `collective` for one that another rank caused, `error` for any other.
        text: the message.
        status: exit status.
        time: seconds since the epoch.
        path: the file with the traceback.
    """

    kind: str
    text: str
    status: int
    time: float
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank ended, as its launcher saw it.

    Attributes:
        rank: its number; -1 if it never said it.
        status: exit status, negative for a signal; None if it is not known, as for ranks of other hosts.
        sign: its last sign of life; None if it never gave one.
        ended_at: when that was noticed, in seconds since the epoch.
        killed: its launcher had to kill it.
        stopped: it was stopped (SIGSTOP) then.
        failure: what it said itself.
        stack: file that shows where it was when it was killed; empty if there is none.
    """

    rank: int
    status: int | None
    sign: Sign | None = None
    ended_at: float = 0.0
    killed: bool = False
    stopped: bool = False
    failure: Failure | None = None
    stack: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        host = f" on {self.sign.host}" if self.sign else ""
        if self.rank >= 0:
            return f"rank {self.rank}{host}"
        return f"a rank{host}"

    @property
    def has_failed(self) -> bool:
        """Whether it did not end well, as far as is known."""
        if self.status is not None:
            return self.status != 0
        return self.failure is not None or (self.sign is not None and self.sign.phase != Phase.ENDING)

    @property
    def place(self) -> str:
        """How far it had come, for messages."""
        if self.sign is None or self.sign.phase == Phase.STARTING:
            return BEFORE_STEPS
        return f"at step {self.sign.step} ({self.sign.phase})"


def record_failure(directory: Path, rank: int, error: Exception) -> Failure:
    """Leave behind what a rank raised: a line for the launcher and, for people, the traceback.

    Args:
        directory: of the signs of life.
        rank: -1 if it is not known.
        error: what was raised.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, MemparError):
        failure = Failure(kind="told", text=text, status=error.exit_status, time=time.time())
    else:
        names = {kind.__name__ for kind in type(error).__mro__}
        # torch's DistError and its kinds, gloo's plain RuntimeError; megatron wraps either.
        waited = "DistError" in names or ("RuntimeError" in names and _OF_COLLECTIVES.search(text) is not None)
        kind = "collective" if waited else "error"
        failure = Failure(kind=kind, text=f"{type(error).__name__}: {text}", status=1, time=time.time())
    path = directory / f"rank_{rank:05d}{_SUFFIX}"
    header = json.dumps({**asdict(failure), "rank": rank})
    path.write_text(f"{header}\n\n{''.join(traceback.format_exception(error))}")
    return failure


def read_failures(directory: Path) -> dict[int, Failure]:
    """What ranks left behind, by their numbers."""
    failures = {}
    for path in files_in(directory, _SUFFIX):
        try:
            said = json.loads(path.read_text().partition("\n")[0])
            rank = said.pop("rank")
            failures[rank] = Failure(**{**said, "path": str(path)})
        except (OSError, ValueError, TypeError, KeyError):
            # Cut short by a full disk or a kill: the exit status has to do.
            continue
    return failures


def is_own_fault(end: RankEnd, timeout: float) -> bool:
    """Whether a rank failed by itself and not for waiting for another one."""
    if end.failure is not None:
        return end.failure.kind != "collective"
    if end.killed or not end.status:
        return False
    if end.status == -signal.SIGABRT and end.sign is not None:
        return end.ended_at - end.sign.time < _WAITED_SHARE * timeout
    return True


def diagnose(ends: list[RankEnd], timeout: float, now: float) -> RanksFailedError:
    """Say in one message why a run failed.

    Args:
        ends: all ranks of which anything is known; at least one failed or was killed.
        timeout: seconds that a collective waits.
        now: seconds since the epoch, when the ranks were found to fail.
    """
    guilty = [end for end in ends if is_own_fault(end, timeout)]
    if guilty:
        # A launcher's SIGTERM ends those that are still starting: it is never the cause where there is another.
        return _own_fault(min(guilty, key=lambda end: (end.status == -signal.SIGTERM, _time_of(end))))
    silent = [end for end in ends if end.killed] or [end for end in ends if end.sign is not None]
    if not silent:
        return RanksFailedError(f"{ends[0].name} ended with status {ends[0].status}; {_RULE}; see the output above.")
    return _hanging(min(silent, key=_progress), ends, timeout, now)


def _time_of(end: RankEnd) -> float:
    return end.failure.time if end.failure else end.ended_at


def _progress(end: RankEnd) -> tuple[bool, int, float]:
    """Least for the rank that the others wait for."""
    return not end.stopped, end.sign.num_marks if end.sign else -1, end.sign.time if end.sign else 0.0


def _own_fault(end: RankEnd) -> RanksFailedError:
    status, failure = end.status or 0, end.failure
    if failure is not None and failure.kind == "told":
        error = RanksFailedError(failure.text)
        error.exit_status = failure.status
        return error
    if failure is not None:
        what, remedy = f"failed {end.place}: {failure.text}", f"its traceback is in {failure.path}; mend that"
    elif status < 0:
        cause, remedy = _signal(-status)
        what = f"was killed by signal {-status} ({cause}) {end.place}"
    else:
        what, remedy = f"ended with status {status} {end.place}", "see its output above"
    return RanksFailedError(f"{end.name} {what}; {_RULE}; {remedy}, and {_RESUME}.")


def _signal(number: int) -> tuple[str, str]:
    """Name and remedy of a signal that killed a rank."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    if number == signal.SIGKILL:
        return f"{name}; the kernel kills so when memory runs out", "look for `Out of memory` in the kernel's log"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return f"{name}; a crash in native code", "see its output above"
    return name, "find out who sent it"


def _hanging(end: RankEnd, ends: list[RankEnd], timeout: float, now: float) -> RanksFailedError:
    # Where nobody had to be killed, the last one came after the others had given up.
    what = "is stopped (SIGSTOP)" if end.stopped else "hangs" if end.killed else "was too late for the others"
    sign = end.sign
    if sign is None:
        seen = "it never gave a sign of life"
    else:
        step = "start-up" if sign.phase == Phase.STARTING else f"step {sign.step} ({sign.phase})"
        seen = f"its last sign of life is {step}, {max(0.0, now - sign.time):.0f} s ago"
    others = f"; the others waited in a collective for train.collective_timeout={timeout:g} s" if len(ends) > 1 else ""
    limit = "" if others else f" and train.collective_timeout={timeout:g} s are the most that is waited"
    remedy = f"see where it was in {end.stack}" if end.stack else f"look at {sign.host if sign else 'its host'}"
    return RanksFailedError(
        f"{end.name} {what}: {seen}{others}; {_RULE}{limit}; {remedy}, raise train.collective_timeout if it was only "
        f"slow, and {_RESUME}."
    )
