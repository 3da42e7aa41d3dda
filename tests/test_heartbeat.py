"""Signs of life: what others read is what was given last, whatever became of the process; and what a sign costs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from full_disk import full_disk
from mempar.errors import MemparError
from mempar.runtime.launch.endings import read_failures
from mempar.runtime.launch.heartbeat import Heartbeat, Phase, read_signs, stack_of
from mempar.runtime.launch.node_ends import read_node_ends

# A mark takes 1 us on one core of a 2.x GHz Xeon, November 2026; the limit leaves room for a busy machine.
MOST_SECONDS_A_MARK = 100e-6


def test_sign_says_what_was_marked_last(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path)
    (first,) = read_signs(tmp_path)
    assert (first.rank, first.pid, first.host) == (-1, os.getpid(), socket.gethostname())
    assert (first.step, first.phase, first.num_marks) == (0, Phase.STARTING, 0)
    heart.identify(3)
    heart.mark(Phase.DATA, 7)
    heart.mark(Phase.COPY_CHECK, 7)
    marked = heart.sign
    assert (marked.rank, marked.step, marked.phase, marked.num_marks) == (3, 7, Phase.COPY_CHECK, 2)
    time.sleep(0.01)
    heart.beat()
    (beaten,) = read_signs(tmp_path, socket.gethostname())
    assert beaten.time > marked.time and beaten.num_marks == 2
    assert read_signs(tmp_path, "elsewhere") == []
    assert [str(phase) for phase in (Phase.FORWARD_BACKWARD, Phase.COPY_CHECK)] == [
        "forward-backward",
        "comparing copies",
    ]


def test_sign_outlives_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mempar.runtime.launch.heartbeat import Heartbeat, Phase\n"
        "heart = Heartbeat(Path(sys.argv[1])); heart.mark(Phase.SAVING, 5); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    (sign,) = read_signs(tmp_path)
    assert (sign.step, sign.phase) == (5, Phase.SAVING)


def test_long_names_of_hosts_are_kept_whole(tmp_path: Path) -> None:
    name = ".".join(["a-node-of-some-length"] * 6)
    heartbeat = Heartbeat(tmp_path, name)
    assert [sign.host for sign in read_signs(tmp_path, name)] == [heartbeat.sign.host] == [name]


def test_unreadable_signs_are_none(tmp_path: Path) -> None:
    (tmp_path / "host-1.life").write_bytes(b"short")
    assert read_signs(tmp_path) == []
    assert Heartbeat().path is None and Heartbeat().stack_path is None


def test_stack_is_named_once_it_is_written(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path)
    assert heart.stack_path is not None
    heart.stack_path.touch()
    assert stack_of(tmp_path, heart.sign) == ""
    heart.stack_path.write_text("x")
    assert stack_of(tmp_path, heart.sign) == str(heart.stack_path)


def test_directory_may_be_removed_while_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(path: object) -> list[str]:
        raise FileNotFoundError(path)

    Heartbeat(tmp_path)
    monkeypatch.setattr(os, "listdir", gone)
    monkeypatch.setattr(os, "scandir", gone)
    assert read_signs(tmp_path) == [] and read_failures(tmp_path) == {} and read_node_ends(tmp_path) == {}


def test_sign_costs_next_to_nothing(tmp_path: Path, note_figure: Callable[[str, float], None]) -> None:
    heart = Heartbeat(tmp_path)
    started = time.perf_counter()
    for step in range(1000):
        heart.mark(Phase.DATA, step)
    seconds = (time.perf_counter() - started) / 1000
    note_figure("microseconds of a sign of life", seconds * 1e6)
    assert seconds < MOST_SECONDS_A_MARK


def test_full_disk_is_told_of_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(MemparError, match=r"\.life cannot be written \(.+\); .*; make room"), full_disk():
        Heartbeat(tmp_path / "ranks")
    assert read_signs(tmp_path / "ranks") == []
