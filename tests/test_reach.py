"""Hosts that cannot be used are all named in one message; ssh is a stub here (tests/cluster has the real one)."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.reach import check_reachable

# What stands before the host's name on the stub's command line is written down; what follows is run here, as sshd does.
STUB = """#!/bin/sh
directory=$(dirname "$0")
echo "$@" >> "$directory/calls"
while [ $# -gt 2 ]; do shift; done
case "$1" in
  lost*)
    echo "Welcome to the example cluster" >&2
    printf '\\033[1mssh: connect to host %s port 22: No route to host\\r\\n' "$1" >&2
    exit 255 ;;
  mute*) exit 255 ;;
  slow*) sleep 0.3 ;;
  dead*) exec sleep 60 ;;
  master*) sleep 60 & echo $! > "$directory/pid" ;;
esac
exec sh -c "$2"
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "stub" / "ssh"
    path.parent.mkdir()
    path.write_text(STUB)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path.parent


def named(*names: str) -> list[Host]:
    return [Host(name=name, slots=1) for name in names]


def refusal(*names: str, timeout: float = 10.0, directory: Path | None = None, python: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        check_reachable(named(*names), ["ssh"], timeout, directory=directory, python=python)
    return str(caught.value)


def test_hosts_that_answer(stub: Path, tmp_path: Path):
    check_reachable(named("a", "b"), ["ssh", "-F", "x y"], 10.0)
    calls = sorted((stub / "calls").read_text().splitlines())
    assert calls == [f"-F x y -o BatchMode=yes -o ConnectTimeout=10 {name} true" for name in "ab"]
    odd = tmp_path / "it's $HOME"
    odd.mkdir()
    check_reachable(named("a"), ["ssh"], 10.0, directory=odd, python=sys.executable)


def test_every_host_that_fails_is_named(stub: Path):
    said = refusal("a", "lost1", "b", "mute", "lost2")
    assert said.splitlines()[0] == "3 of 5 hosts cannot be used:"
    assert "  lost1: [1mssh: connect to host lost1 port 22: No route to host\n" in said
    assert "  mute: ended with status 255\n" in said
    assert "  lost2: [1mssh: connect to host lost2" in said
    assert "Welcome" not in said and "  a:" not in said
    assert "`ssh lost1 true` works without a question" in said
    assert "file system" not in said


def test_what_a_run_needs_is_looked_for(stub: Path, tmp_path: Path):
    missing = tmp_path / "it's gone"
    said = refusal("a", directory=missing, python="python-of-nobody")
    assert f"  a: directory {missing} is not there\n" in said and "that all hosts have" in said
    assert "without a question" not in said
    said = refusal("a", "lost", directory=tmp_path, python="/no/python")
    assert "  a: Python /no/python is not there\n" in said and "that all hosts have" in said
    assert f"`{shlex.join(['ssh', 'lost', 'true'])}`" in said


def test_a_host_that_does_not_answer(stub: Path):
    began = time.monotonic()
    assert "  dead: no answer in 0.5 s\n" in refusal("a", "dead", timeout=0.5)
    assert time.monotonic() - began < 10.0


def test_hosts_are_asked_side_by_side(stub: Path):
    began = time.monotonic()
    check_reachable(named(*(f"slow{index}" for index in range(32))), ["ssh"], 60.0)
    # One after the other they would sleep for 9.6 s.
    assert time.monotonic() - began < 8.0
    assert len((stub / "calls").read_text().splitlines()) == 32


def test_what_ssh_leaves_behind_is_not_waited_for(stub: Path):
    check_reachable(named("master"), ["ssh"], 20.0)
    os.kill(int((stub / "pid").read_text()), 15)


def test_there_is_no_ssh(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be run \(No such file or directory\).*install its client"):
        check_reachable(named("a"), [str(tmp_path / "ssh")], 1.0)


def test_a_name_that_is_an_option_does_not_reach_ssh(stub: Path):
    with pytest.raises(ConfigError, match="is no host name"):
        check_reachable(named("a", "-oProxyCommand=touch x"), ["ssh"], 1.0)
    assert not (stub / "calls").exists()
