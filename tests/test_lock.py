"""One writer at a time, also after a launcher was killed, and nothing left that keeps the next one out."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from full_disk import full_disk
from mempar.errors import ConfigError
from mempar.runtime.launch import lock
from mempar.runtime.launch.lock import RunLock, share_lock
from mempar.runtime.run_dir import check_free

HOLD = (
    "import sys, time; from pathlib import Path; from mempar.runtime.launch.lock import RunLock, share_lock\n"
    "root, how = Path(sys.argv[1]), sys.argv[2]\n"
    "run = RunLock(root, print)\n"
    "lock = run.__enter__() if how == 'launcher' else share_lock(root)\n"
    "print('held', flush=True); time.sleep(60)"
)


def held_by(root: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_second_writer_is_refused_until_the_first_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.3)
    holder = held_by(tmp_path / "run", "launcher")
    said = rf"in use: process {holder.pid} on {os.uname().nodename} has been writing there since \d{{4}}-"
    with pytest.raises(ConfigError, match=said), RunLock(tmp_path / "run", print):
        pass
    end(holder)
    with RunLock(tmp_path / "run", print):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    # What stays is no run.
    check_free(tmp_path / "run")


def test_ranks_keep_the_lock_of_their_dead_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end(held_by(tmp_path, "launcher"))
    ranks = [held_by(tmp_path, "rank") for _ in range(2)]
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(ConfigError, match="in use: the ranks of process"), RunLock(tmp_path, print):
        pass
    monkeypatch.undo()
    for rank in ranks:
        rank.kill()
    # Whoever dies is waited for.
    started = time.monotonic()
    with RunLock(tmp_path, print):
        assert time.monotonic() - started < 3.0
        own = share_lock(tmp_path)
        assert own is not None
        own.close()
    for rank in ranks:
        rank.communicate()


def test_file_system_without_locks_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1 and "file system without locks" in said[0]
    assert share_lock(tmp_path) is None


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), RunLock(tmp_path / "file" / "run", print):
        pass


def test_full_disk_is_refused_and_the_lock_given_back(tmp_path: Path) -> None:
    said = r"run cannot be written \(.+\); .*; make room there, or choose"
    with pytest.raises(ConfigError, match=said), full_disk(), RunLock(tmp_path / "run", print):
        pass
    with RunLock(tmp_path / "run", print):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_lock_of_the_ranks_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.ranks").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written \(Is a directory\)"), RunLock(tmp_path, print):
        pass
