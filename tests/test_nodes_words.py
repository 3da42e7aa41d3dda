"""What agents, their launcher and each other's nodes tell one another: beats, ends of ranks, verdicts."""

import ctypes
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch import node_ends, words
from mempar.runtime.launch.endings import RankEnd
from mempar.runtime.launch.heartbeat import Heartbeat, Phase, Sign
from mempar.runtime.launch.nodes import Node
from mempar.runtime.launch.supervisor import Supervisor


class Beats:
    """Beats that come over a network, each a moment after the wait for it, until somebody stops them."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def __iter__(self) -> Iterator[str]:
        while not self.stopped.is_set():
            time.sleep(0.1)
            time.sleep(0.3)
            yield "beat\n"
        self.stopped.clear()
        while not self.stopped.is_set():
            time.sleep(0.05)


def test_silence_is_not_what_a_process_misses_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(words, "_NAP_SECONDS", 0.1)
    beats: Any = Beats()
    listener = words.Listener(beats)
    ends: list[object] = []
    # It ends the process otherwise; for good, as its threads outlive this test.
    listener._end = ends.append
    listener.start(Supervisor(Path("/nowhere"), 2.0, Node(name="a", num_ranks=1)))
    # As importing libraries does: nothing else of Python runs meanwhile.
    ctypes.PyDLL(None).usleep(1_500_000)
    time.sleep(1.0)
    assert ends == []
    beats.stopped.set()
    time.sleep(2.5)
    assert len(ends) == 1
    beats.stopped.set()


def test_ends_of_ranks_are_read_back(tmp_path: Path) -> None:
    sign = Sign(rank=24, pid=7, host="c", step=3, phase=Phase.UPDATE, num_marks=9, time=1.25)
    end = node_ends.NodeEnd(
        stopped_early="SIGTERM",
        node_rank=3,
        ends=[RankEnd(rank=24, status=-9, ended_at=1.5, sign=sign), RankEnd(rank=25, status=0)],
    )
    node_ends.record_node_end(tmp_path, end)
    (tmp_path / "node_00004.ended.json").write_text('[{"rank"')
    assert node_ends.read_node_ends(tmp_path) == {3: end}
    assert end.has_failed


def test_ends_need_no_place_once_the_head_has_cleared_up(tmp_path: Path) -> None:
    node_ends.record_node_end(tmp_path / "gone", node_ends.NodeEnd(node_rank=1, ends=[RankEnd(rank=1, status=0)]))
    assert not (tmp_path / "gone").exists()


def test_launchers_know_the_last_signs_of_their_ranks_better(tmp_path: Path) -> None:
    """A mapped file's pages come late over a network: what lies there is older than what its node's launcher saw."""
    heartbeat = Heartbeat(tmp_path, "other")
    heartbeat.identify(1)
    heartbeat.mark(Phase.DATA, 1)
    newer = replace(heartbeat.sign, step=7, num_marks=40)
    end = RankEnd(rank=1, status=-9, sign=newer, killed=True)
    node_ends.record_node_end(tmp_path, node_ends.NodeEnd(node_rank=1, ends=[end]))
    head = Supervisor(tmp_path, 2.0, Node(name="head", num_ranks=1, num_nodes=2))
    head.start()
    assert head.finish({0: 1}) == [replace(end, rank=0, status=1, sign=None, killed=False, ended_at=ANY), end]


def test_nodes_agree_that_no_step_was_made(tmp_path: Path) -> None:
    """One saw its ranks end before the first step; here they had begun it, which nobody can end without the others."""
    heartbeat = Heartbeat(tmp_path, "head")
    heartbeat.identify(0)
    heartbeat.mark(Phase.DATA, 1)
    head = Supervisor(tmp_path, 2.0, Node(name="head", num_ranks=1, num_nodes=2))
    head.wish("SIGTERM")
    head.start()
    node_ends.record_node_end(tmp_path, node_ends.NodeEnd(node_rank=1, ends=[], stopped_early="SIGTERM"))
    head.finish({0: 1})
    assert head.stopped_early


@pytest.mark.parametrize(("statuses", "told"), [({}, []), ({1: 1}, [1])])
def test_good_ends_are_no_news(tmp_path: Path, statuses: dict[int, int], told: list[int]) -> None:
    other = Supervisor(tmp_path, 2.0, Node(name="other", node_rank=1, num_ranks=1, num_nodes=2))
    other.start()
    other.finish(statuses)
    assert list(node_ends.read_node_ends(tmp_path)) == told


@pytest.mark.parametrize("error", [None, MemparError("it broke"), ConfigError("it is wrong")])
def test_verdict_is_heard_as_it_was_told(error: MemparError | None) -> None:
    pipe = io.StringIO()
    words.tell(error, pipe)
    is_verdict, heard = words.hear_verdict(pipe.getvalue().splitlines()[-1])
    assert is_verdict
    assert (type(heard), str(heard)) == (type(error), str(error))


def test_other_lines_are_no_verdict() -> None:
    assert words.hear_verdict("step 1 | loss 2") == (False, None)
    assert words.hear_verdict("@mempar-verdict {not json") == (False, None)
