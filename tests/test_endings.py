"""Causes are told from consequences: which rank a message names, and what it says."""

import re
import signal
from pathlib import Path

import pytest

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch.endings import Failure, RankEnd, diagnose, read_failures, record_failure
from mempar.runtime.launch.heartbeat import Phase, Sign

NOW = 1000.0
TIMEOUT = 60.0


def sign(rank: int, *, step: int = 12, marks: int = 50, seconds_ago: float = 61.0, host: str = "host1") -> Sign:
    return Sign(
        rank=rank,
        pid=100 + rank,
        host=host,
        step=step,
        phase=Phase.FORWARD_BACKWARD,
        num_marks=marks,
        time=NOW - seconds_ago,
    )


def waited(rank: int) -> RankEnd:
    """A rank that gave up waiting."""
    failure = Failure(kind="collective", text="RuntimeError: timed out", status=1, time=NOW, path="log")
    return RankEnd(rank=rank, status=1, sign=sign(rank), ended_at=NOW, failure=failure)


def raised(rank: int, time: float) -> RankEnd:
    failure = Failure(kind="error", text="ValueError: no", status=1, time=time, path="log")
    return RankEnd(rank=rank, status=1, sign=sign(rank), ended_at=NOW, failure=failure)


def aborted(rank: int, **given: float) -> RankEnd:
    return RankEnd(rank=rank, status=-signal.SIGABRT, sign=sign(rank, **given), ended_at=NOW)  # type: ignore[arg-type]


CASES: dict[str, tuple[list[RankEnd], str]] = {
    "first of two errors": ([raised(0, NOW), raised(1, NOW - 1)], r"rank 1 on host1 failed at step 12"),
    "error before its consequences": ([waited(0), raised(1, NOW + 5)], r"rank 1 .* failed .*: ValueError: no; .* log;"),
    "launcher's SIGTERM while starting": (
        [RankEnd(rank=0, status=-15, ended_at=NOW - 1), RankEnd(rank=1, status=3, ended_at=NOW)],
        r"rank 1 ended with status 3 before the first step",
    ),
    "crash": ([waited(0), RankEnd(rank=1, status=-11, sign=sign(1), ended_at=NOW)], r"signal 11 \(SIGSEGV; a crash"),
    "unknown signal": ([RankEnd(rank=1, status=-77, sign=sign(1), ended_at=NOW)], r"signal 77 \(unknown\)"),
    # NCCL's watchdog aborts those that wait, and in the end the one that hangs too.
    "watchdog": (
        [aborted(0), aborted(1, marks=49, seconds_ago=70.0), aborted(2)],
        r"rank 1 on host1 was too late for the others: .* 70 s ago; the others waited .*collective_timeout=60 s",
    ),
    "abort that is no watchdog's": ([waited(0), aborted(1, seconds_ago=1.0)], r"rank 1 .* \(SIGABRT; a crash"),
    "least progress of those that live": (
        [
            waited(0),
            RankEnd(rank=1, status=-9, sign=sign(1), killed=True),
            RankEnd(rank=2, status=-9, sign=sign(2, marks=49), killed=True),
        ],
        r"rank 2 on host1 hangs",
    ),
    "stopped before all": (
        [
            RankEnd(rank=1, status=-9, sign=sign(1), killed=True, stopped=True),
            RankEnd(rank=2, status=-9, sign=sign(2, marks=49), killed=True),
        ],
        r"rank 1 on host1 is stopped",
    ),
    "hanging on another host": (
        [waited(0), waited(1), RankEnd(rank=2, status=None, sign=sign(2, marks=40, host="host2"))],
        r"rank 2 on host2 was too late .*; look at host2",
    ),
    "nothing known": ([RankEnd(rank=-1, status=None)], "a rank ended with status None"),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_cause(case: str) -> None:
    ends, message = CASES[case]
    for order in (ends, ends[::-1]):
        error = diagnose(order, TIMEOUT, NOW)
        assert error.exit_status == 1
        assert re.search(message, str(error)), str(error)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (ConfigError("train.x=1 is bad; it must not be; use 2."), "told", 2),
        (MemparError("copies differ after step 2."), "told", 1),
        (RuntimeError("[tcp/pair.cc] Connection closed by peer [::1]:99"), "collective", 1),
        (RuntimeError("shapes do not match"), "error", 1),
        (ValueError("the socket is green"), "error", 1),
        (KeyError(), "error", 1),
    ],
)
def test_what_a_rank_raised_is_read_back(tmp_path: Path, error: Exception, kind: str, status: int) -> None:
    record_failure(tmp_path, 5, error)
    read = read_failures(tmp_path)[5]
    assert (read.kind, read.status) == (kind, status)
    assert str(error) in read.text and Path(read.path).read_text().count("\n") > 1
    told = diagnose([RankEnd(rank=5, status=status, sign=sign(5), failure=read)], TIMEOUT, NOW)
    assert told.exit_status == status
    if kind == "told":
        assert str(told) == str(error)


def test_failures_cut_short_are_none(tmp_path: Path) -> None:
    (tmp_path / "rank_00001.failed.txt").write_text('{"kind": "err')
    assert read_failures(tmp_path) == {}
