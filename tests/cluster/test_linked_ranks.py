"""Ranks and delay lines of the tests of links end with the process that started them, and say what is missing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import delay_line
import exchange_rank
import linked_ranks

# Starts a rank that waits for a question nobody asks, says who it is, and waits.
PARENT = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2], str(os.getpid())])
print(rank.pid, flush=True)
time.sleep(120)
"""


def is_running(pid: int) -> bool:
    try:
        # A zombie has no command line.
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_rank_dies_with_who_started_it(tmp_path: Path):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", PARENT, exchange_rank.__file__, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # Either it has said whom it dies with, or it will find that one gone.
        time.sleep(0.2)
        assert is_running(pid)
        parent.kill()
    until = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)


def test_deadline_is_beyond_that_of_an_answer():
    assert linked_ranks._SECONDS < exchange_rank.DEADLINE_SECONDS < delay_line.DEADLINE_SECONDS


def test_missing_taps_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delay_line, "TUN", str(tmp_path / "tun"))
    with pytest.raises(SystemExit, match=r"no interface near by .*/tun \(No such file or directory\)"):
        delay_line.open_tap("near")
