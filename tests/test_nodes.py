"""Launches of several nodes: agents find each other, and end together; one speaks for all.

Here nodes are agents side by side on this machine, and their ranks fakes (fake_rank.py); tests/cluster has real nodes.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from free_port import free_port
from mempar.errors import ConfigError, MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import words
from mempar.runtime.launch.endings import RanksFailedError
from mempar.runtime.launch.heartbeat import Phase, read_signs
from mempar.runtime.launch.lock import RunLock, share_lock
from mempar.runtime.launch.node import main
from mempar.runtime.launch.node_ends import read_node_ends
from mempar.runtime.overrides import override, to_yaml

TESTS = Path(__file__).parent
AGENT = [sys.executable, "-m", "mempar.runtime.launch.node"]


class Launch:
    """Agents of a launch on this machine, as processes."""

    def __init__(self, root: Path, acts: list[str], *, port: int = 0, patience: float = 60.0) -> None:
        self.root, self.num_nodes = root, len(acts)
        run = override(RunConfig(), ["train.collective_timeout=2"])
        (root / "config.yaml").write_text(to_yaml(run))
        (root / "act.json").write_text(json.dumps(acts))
        self.arguments = [
            str(root),
            *("--nodes", str(len(acts)), "--nproc", "1", "--attempt", "1", "--patience", str(patience)),
            *("--rendezvous", f"127.0.0.1:{port or free_port()}", "--worker", "fake_rank", "--stdin"),
        ]
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *only: int) -> None:
        path = os.pathsep.join([str(TESTS), *sys.path])
        for rank in only or range(self.num_nodes):
            command = [*AGENT, *self.arguments, "--node-rank", str(rank), "--node", f"node-{rank}"]
            environment = {**os.environ, "PYTHONPATH": path}
            pipe = subprocess.PIPE
            self.agents.append(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
            )

    def wait_for(self, phase: Phase) -> list[psutil.Process]:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            signs = read_signs(self.root / "ranks" / "1")
            if [sign.phase for sign in signs] == [phase] * self.num_nodes:
                return [psutil.Process(sign.pid) for sign in signs]
            time.sleep(0.05)
        raise AssertionError(f"no {phase}")

    def say(self, word: str, node: int = 0) -> None:
        pipe = self.agents[node].stdin
        assert pipe is not None
        pipe.write(f"{word}\n")
        pipe.flush()

    def ends(self) -> list[tuple[int, str, MemparError | None]]:
        """Status, output without its last line, and verdict of every agent."""
        found = []
        for agent in self.agents:
            assert agent.stdout is not None and agent.stderr is not None
            # Their input stays open: its end would end them.
            agent.wait(timeout=60)
            err, lines = agent.stderr.read(), agent.stdout.read().splitlines()
            assert err == "", err
            verdicts = [words.hear_verdict(line) for line in lines]
            error = verdicts[-1][1] if verdicts and verdicts[-1][0] else MemparError("it said nothing")
            found.append((agent.returncode, "\n".join(line for line in lines[:-1] if line), error))
        return found


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    made: list[Launch] = []

    def start(*acts: str, port: int = 0, patience: float = 60.0) -> Launch:
        made.append(Launch(tmp_path, list(acts), port=port, patience=patience))
        return made[-1]

    yield start
    for one in made:
        for agent in one.agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()
            for pipe in (agent.stdin, agent.stdout, agent.stderr):
                if pipe is not None:
                    pipe.close()


def test_ranks_of_nodes_are_one_world_and_save_when_one_agent_is_told(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    started = launch("go on", "go on")
    started.start()
    ranks = started.wait_for(Phase.FORWARD_BACKWARD)
    for node in range(2):
        started.say("SIGTERM", node)
    assert [(status, error) for status, _, error in started.ends()] == [(0, None)] * 2
    assert [(tmp_path / f"saved_{rank}").exists() for rank in range(2)] == [True, True]
    for rank in range(2):
        words_of_rank = (tmp_path / f"started_{rank}").read_text()
        assert f"--node node-{rank} " in words_of_rank and "--go-on" in words_of_rank
    assert not any(rank.is_running() for rank in ranks)
    assert not (tmp_path / "ranks").exists()


def test_head_names_the_rank_of_another_node_that_was_killed(launch: Callable[..., Launch]) -> None:
    started = launch("go on", "kill")
    started.start()
    began = time.monotonic()
    head, other = started.ends()
    assert head[0] == other[0] == 1
    assert "rank 1 on node-1 was killed by signal 9" in str(head[2])
    assert time.monotonic() - began < 45.0


def test_refusal_of_a_rank_is_bad_input_for_all(launch: Callable[..., Launch]) -> None:
    started = launch("go on", "refuse")
    started.start()
    head, _ = started.ends()
    assert head[0] == 2
    assert str(head[2]) == "model.hidden_size=7 is odd; it must be even; use 8."


def test_scheduler_that_ends_all_for_one_does_not_hide_why(launch: Callable[..., Launch]) -> None:
    started = launch("start for ever", "leave")
    started.start()
    # As srun does: the others are told to end, here before they have begun.
    assert started.agents[1].wait(timeout=60) == 1
    started.say("SIGTERM")
    head, _ = started.ends()
    assert head[0] == 1
    assert "rank 1 on node-1 ended with status 7" in str(head[2])


def test_agents_end_when_their_launcher_is_gone(launch: Callable[..., Launch]) -> None:
    started = launch("go on", "go on")
    started.start()
    ranks = started.wait_for(Phase.FORWARD_BACKWARD)
    for agent in started.agents:
        assert agent.stdin is not None
        agent.stdin.close()
        agent.stdin = None
    began = time.monotonic()
    for agent in started.agents:
        assert agent.wait(timeout=20) == 1
    psutil.wait_procs(ranks, timeout=5)
    assert not any(rank.is_running() for rank in ranks)
    assert time.monotonic() - began < 15.0


def test_a_node_that_does_not_come_is_named(launch: Callable[..., Launch], tmp_path: Path) -> None:
    started = launch("go on", "go on", patience=3.0)
    started.start(0)
    ((status, _, error),) = started.ends()
    assert status == 1
    assert "node(s) 1 of 2 did not come" in str(error)
    assert not list((tmp_path / "ranks" / "1").glob("*.life"))


@pytest.mark.parametrize("come", [(0,), (0, 1)])
def test_signal_to_the_head_while_nodes_gather_ends_all_at_once(
    launch: Callable[..., Launch], tmp_path: Path, come: tuple[int, ...]
) -> None:
    started = launch("start for ever", "start for ever")
    started.start(*come)
    until = time.monotonic() + 30.0
    while not (tmp_path / "lock").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    started.agents[0].send_signal(signal.SIGTERM)
    began = time.monotonic()
    head, *others = started.ends()
    assert (head[0], head[2]) == (0, None)
    assert "ended by SIGTERM before the first step" in head[1]
    assert [(other[0], other[2]) for other in others] == [(0, None)] * len(others)
    assert time.monotonic() - began < 20.0


@pytest.mark.parametrize("node", [0, 1])
def test_signal_to_one_agent_before_the_first_step_ends_all(launch: Callable[..., Launch], node: int) -> None:
    started = launch("start for ever", "start for ever")
    started.start()
    started.wait_for(Phase.STARTING)
    started.agents[node].send_signal(signal.SIGTERM)
    head, other = started.ends()
    assert (head[0], head[2]) == (other[0], other[2]) == (0, None)
    assert "ended by SIGTERM before the first step" in head[1]


@pytest.fixture
def agent_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `main` be called in this process, which must survive its own test, and heed signals after it."""
    monkeypatch.setattr("mempar.runtime.launch.node.die_with", lambda parent: None)
    monkeypatch.setattr("mempar.runtime.launch.node.ignore_signals", lambda: None)


@pytest.mark.usefixtures("agent_here")
def test_agent_refuses_a_directory_that_it_does_not_see(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert main([str(tmp_path), "--nodes", "2", "--nproc", "1"]) == 2
    assert "is no run's directory as seen from node gpu-17" in capsys.readouterr().err


@pytest.mark.usefixtures("agent_here")
def test_a_nodes_own_trouble_is_said_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Under a scheduler, where each node's output is all that comes of it."""
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    given = [str(tmp_path), "--nodes", "2", "--nproc", "1", "--node-rank", "1", "--node", "b", "--attempt", "x"]
    assert main([*given, "--rendezvous", f"127.0.0.1:{free_port()}", "--patience", "0.5"]) == 1
    assert "node b did not reach the head node" in capsys.readouterr().err

    def fail(*given: object, **more: object) -> None:
        raise RanksFailedError("rank 0 on a was killed.")

    monkeypatch.setattr("mempar.runtime.launch.node.run_node", fail)
    assert main([*given, "--rendezvous", "a:1"]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("agent_here")
def test_signal_before_anything_is_started_ends_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    ranks = share_lock(tmp_path)
    assert ranks is not None
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    # It waits for the ranks of an earlier start.
    assert main([str(tmp_path), "--nodes", "2", "--nproc", "1", "--attempt", "x", "--rendezvous", "a:1"]) == 0
    assert "ended by SIGTERM before anything was started" in capsys.readouterr().out
    assert read_node_ends(tmp_path / "ranks" / "x")[0].stopped_early == "SIGTERM"
    timer.join()
    ranks.close()


def test_lock_is_waited_for_as_long_as_lost_ranks_live(tmp_path: Path) -> None:
    ranks = share_lock(tmp_path)
    assert ranks is not None
    timer = threading.Timer(1.0, ranks.close)
    timer.start()
    with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path, print, 0.1):
        pass
    with RunLock(tmp_path, print, 20.0):
        assert ranks.closed
    timer.join()
