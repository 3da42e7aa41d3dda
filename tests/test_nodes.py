"""Launches of several nodes: agents find each other, and end together; one speaks for all.

Here nodes are agents side by side on this machine, and their ranks fakes (fake_rank.py); tests/cluster has real nodes.
"""

import ctypes
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import psutil
import pytest

from mempar.errors import ConfigError, DamagedError, MemparError, UnreadableError
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import going_on, node_ends, nodes, words
from mempar.runtime.launch.endings import RankEnd, RanksFailedError
from mempar.runtime.launch.heartbeat import Heartbeat, Phase, Sign, read_signs
from mempar.runtime.launch.lock import RunLock, share_lock
from mempar.runtime.launch.node import main
from mempar.runtime.launch.nodes import Node, gather, reaching_interface
from mempar.runtime.launch.supervisor import Supervisor
from mempar.runtime.overrides import override, to_yaml
from mempar.runtime.run_dir import RunDir

TESTS = Path(__file__).parent
AGENT = [sys.executable, "-m", "mempar.runtime.launch.node"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def test_signal_while_nodes_gather_ends_at_once(launch: Callable[..., Launch], tmp_path: Path) -> None:
    started = launch("go on", "go on")
    started.start(0)
    until = time.monotonic() + 30.0
    while not (tmp_path / "lock").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    started.agents[0].send_signal(signal.SIGTERM)
    began = time.monotonic()
    ((status, said, error),) = started.ends()
    assert (status, error) == (0, None)
    assert "ended by SIGTERM before the first step" in said
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


def test_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_PORT_PATIENCE_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = Node(name="a", num_ranks=1, num_nodes=2, rendezvous=f"127.0.0.1:{port}", attempt="x")
        with pytest.raises(ConfigError, match=rf"port {port} cannot be used .*--port"):
            gather(node, 5.0, lambda: False)


def test_head_that_is_not_there_is_named() -> None:
    node = Node(name="b", num_ranks=1, node_rank=1, num_nodes=2, rendezvous=f"127.0.0.1:{free_port()}", attempt="x")
    with pytest.raises(MemparError, match="node b did not reach the head node"):
        gather(node, 0.5, lambda: False)
    assert gather(node, 60.0, lambda: True) is None


def test_nodes_of_another_start_are_not_taken_for_these() -> None:
    port = free_port()

    def node(rank: int, attempt: str) -> Node:
        return Node(
            name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=f"127.0.0.1:{port}", attempt=attempt
        )

    met: list[object] = []
    head = threading.Thread(target=lambda: met.append(gather(node(0, "2"), 20.0, lambda: False)))
    head.start()
    with pytest.raises(MemparError, match=r"node\(s\) 0 of 2 did not come"):
        gather(node(1, "1"), 2.0, lambda: False)
    assert gather(node(1, "2"), 20.0, lambda: False) is not None
    head.join()
    assert met[0] is not None


def test_head_keeps_the_store_until_the_others_have_left_it() -> None:
    rendezvous = f"127.0.0.1:{free_port()}"
    ranks = [
        Node(name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=rendezvous, attempt="x")
        for rank in range(2)
    ]
    left: list[int] = []

    def head() -> None:
        store = gather(ranks[0], 20.0, lambda: False)
        nodes.part(ranks[0], store)
        left.append(0)

    thread = threading.Thread(target=head)
    thread.start()
    store = gather(ranks[1], 20.0, lambda: False)
    time.sleep(0.5)
    assert left == []
    nodes.part(ranks[1], store)
    thread.join(timeout=5.0)
    assert left == [0]


@pytest.mark.parametrize("wrong", ["", "host", "host:", "host:0", "host:70000", "host:x"])
def test_meeting_place_must_be_host_and_port(wrong: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        nodes.endpoint(wrong)


def test_interface_is_the_one_that_reaches_the_head() -> None:
    assert reaching_interface("127.0.0.1:1") == "lo"
    assert reaching_interface("no-such-host.invalid:1") == ""
    assert nodes.endpoint("[::1]:29500") == ("::1", 29500)


def test_head_goes_by_the_address_at_which_others_reach_it() -> None:
    """Its own name may stand for 127.0.1.1 there, as Debian has it: gloo would tell others to connect to themselves."""
    addresses = {
        known.address: name
        for name, found in psutil.net_if_addrs().items()
        for known in found
        if known.family == socket.AF_INET
    }
    for own, seen in [("localhost", address) for address in addresses]:
        port = free_port()
        head, other = (
            Node(name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=f"{host}:{port}", attempt="x")
            for rank, host in enumerate((own, seen))
        )
        met: list[object] = []
        thread = threading.Thread(target=lambda met=met, node=head: met.append(gather(node, 20.0, lambda: False)))
        thread.start()
        store = gather(other, 20.0, lambda: False)
        thread.join()
        assert nodes.meeting_interface(head, met[0]) == nodes.meeting_interface(other, store) == addresses[seen]


def test_ranks_are_numbered_node_by_node() -> None:
    node = Node(name="c", num_ranks=8, node_rank=3, num_nodes=4)
    assert (node.first_rank, node.is_head) == (24, False)


def test_agent_refuses_a_directory_that_it_does_not_see(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The parent-death signal is for real agents: this process must survive its own test.
    monkeypatch.setattr("mempar.runtime.launch.node.die_with", lambda parent: None)
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert main([str(tmp_path), "--nodes", "2", "--nproc", "1"]) == 2
    assert "is no run's directory as seen from node gpu-17" in capsys.readouterr().err


def test_a_nodes_own_trouble_is_said_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Under a scheduler, where each node's output is all that comes of it."""
    monkeypatch.setattr("mempar.runtime.launch.node.die_with", lambda parent: None)
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    given = [str(tmp_path), "--nodes", "2", "--nproc", "1", "--node-rank", "1", "--node", "b", "--attempt", "x"]
    assert main([*given, "--rendezvous", f"127.0.0.1:{free_port()}", "--patience", "0.5"]) == 1
    assert "node b did not reach the head node" in capsys.readouterr().err

    def fail(*given: object, **more: object) -> None:
        raise RanksFailedError("rank 0 on a was killed.")

    monkeypatch.setattr("mempar.runtime.launch.node.run_node", fail)
    assert main([*given, "--rendezvous", "a:1"]) == 1
    assert capsys.readouterr().err == ""


def test_signal_before_anything_is_started_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("mempar.runtime.launch.node.die_with", lambda parent: None)
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    ranks = share_lock(tmp_path)
    assert ranks is not None
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    # It waits for the ranks of an earlier start.
    assert main([str(tmp_path), "--nodes", "2", "--nproc", "1", "--attempt", "x", "--rendezvous", "a:1"]) == 0
    assert "ended by SIGTERM before anything was started" in capsys.readouterr().out
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


def test_damaged_checkpoint_is_passed_over_and_keeps_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunDir(tmp_path)
    for step in (10, 20, 30):
        (paths.checkpoint(step)).mkdir(parents=True)
        (paths.checkpoint(step) / "manifest.json").touch()
    monkeypatch.setattr(going_on, "check_same_data", lambda manifest, run: None)

    def open_it(path: Path, run: RunConfig) -> Path:
        if path.name.endswith("30"):
            raise DamagedError("its manifest is cut short.")
        return path

    monkeypatch.setattr(going_on, "open_checkpoint", open_it)
    said: list[str] = []
    assert going_on.starting_point(paths, RunConfig(), said.append) == paths.checkpoint(20)
    assert said == ["step_00000030 is passed over: its manifest is cut short."]
    # A piece of the next one turns out to be damaged when it is read.
    found = DamagedError("a block has another checksum.")
    told = going_on.pass_over(paths.checkpoint(20), paths, found, writes=True)
    assert told.exit_status == 1
    assert str(told) == f"{found} The next start of this run goes on from step_00000010."
    assert going_on.starting_point(paths, RunConfig(), said.append) == paths.checkpoint(10)
    assert said[-1] == "step_00000020 is passed over: a block has another checksum."
    # There is nothing before the first one, and one of another run is not for this one to pass over.
    assert going_on.pass_over(paths.checkpoint(10), paths, found, writes=True) is found
    assert going_on.pass_over(tmp_path / "elsewhere", paths, found, writes=True) is found


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunDir(tmp_path)
    for step in (10, 20):
        (paths.checkpoint(step)).mkdir(parents=True)
        (paths.checkpoint(step) / "manifest.json").touch()

    def open_it(path: Path, run: RunConfig) -> Path:
        assert path.name.endswith("20")
        raise UnreadableError("it cannot be read (Input/output error).")

    monkeypatch.setattr(going_on, "open_checkpoint", open_it)
    with pytest.raises(UnreadableError, match="Input/output error"):
        going_on.starting_point(paths, RunConfig(), print)


def test_a_run_without_checkpoints_starts_from_where_it_was_to(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    assert going_on.starting_point(paths, RunConfig(), print) is None
    going_on.record_start(paths, Path("/somewhere/step_00000010"))
    assert going_on.starting_point(paths, RunConfig(), print) == Path("/somewhere/step_00000010")
    going_on.record_start(paths, None)
    assert going_on.starting_point(paths, RunConfig(), print) is None
    (paths.launch / "start.json").write_text("{")
    with pytest.raises(ConfigError, match="launch the run anew"):
        going_on.starting_point(paths, RunConfig(), print)
