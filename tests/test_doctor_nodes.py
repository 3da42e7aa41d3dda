"""Reaching nodes: command lines, and nodes that answer, fail or hang (mempar.tools.doctor node_commands, across, node,
together)."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mempar.tools.doctor import across, together
from mempar.tools.doctor.across import Nodes
from mempar.tools.doctor.finding import ERROR, NOTE
from mempar.tools.doctor.needs import Needs
from mempar.tools.doctor.node_commands import NodeCommand, srun_command, ssh_commands
from mempar.tools.doctor.together import Site, look_together
from mempar.tools.doctor.wire import HELLO, Inbox, Question
from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.profile import LaunchProfile, SlurmConfig, SshConfig

QUESTION = Question(needs=Needs(), root="runs", num_ranks=1, shared="/")
# A node that says what it is told to say, and then does something.
STUB = """
import json, sys, time
from mempar.tools.doctor.wire import lines_of
rank, act, trial = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print("some chatter of a login shell", flush=True)
def say(kind, values):
    print(*lines_of(rank, kind, values), sep="\\n", flush=True)
if act == "deaf":
    time.sleep(600)
if act == "lost":
    sys.exit("ssh: connect to host: refused")
say("hello", {"name": f"stub{rank}"})
if act == "crash":
    say("failed", {"text": "ImportError: no libcuda"})
    sys.exit(1)
if act == "slow":
    time.sleep(600)
unshared = "is not there" if act == "blind" else ""
said = {"name": f"stub{rank}", "findings": [], "unshared": unshared, "packages": {"torch": "2"}, "devices": []}
say("answer", {**said, "num_ranks": 1})
for line in sys.stdin:
    if line.startswith("{") and "rendezvous" in line:
        if trial == "die":
            sys.exit("killed")
        say("ended", {"error": trial, "statuses": {}})
    if line.strip() in ("end", "KILL"):
        break
"""


def stubs(*acts: str, trial: str = "") -> list[NodeCommand]:
    return [
        NodeCommand(words=(sys.executable, "-c", STUB, str(rank), act, trial), node_ranks=(rank,))
        for rank, act in enumerate(acts)
    ]


def site(commands: list[NodeCommand]) -> Site:
    names = tuple(f"h{rank}" for rank in range(len(commands)))
    return Site(
        names=names,
        hosts=names,
        commands_for=lambda shared: commands,
        address_of=lambda name: name,
        port=1,
        wait_seconds=0.0,
    )


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_ssh_reaches_each_host_as_launches_do(tmp_path: Path) -> None:
    profile = LaunchProfile(
        python="/shared/python",
        setup=("ulimit -l unlimited",),
        env={"NCCL_DEBUG": "it's on"},
        ssh=SshConfig(config="/a/config", user="me", connect_timeout=7),
    )
    hosts = (Host(name="a", slots=8), Host(name="b", slots=8))
    first, second = ssh_commands(profile, hosts, tmp_path)
    assert (first.node_ranks, second.node_ranks) == ((0,), (1,)) and not first.is_queued
    assert first.words[:5] == ("ssh", "-F", "/a/config", "-l", "me") and "ConnectTimeout=7" in first.words
    assert second.words[-2] == "b"
    _, shell, option, script = shlex.split(second.words[-1])
    steps = script.split(" && ")
    assert (shell, option) == ("sh", "-c")
    assert steps[0] == "eval 'ulimit -l unlimited'" and shlex.split(steps[1]) == ["export", "NCCL_DEBUG=it's on"]
    assert steps[-1] == "exec /shared/python -m mempar.tools.doctor.node --node-rank 1 --node b"


@pytest.mark.parametrize("in_job", [False, True])
def test_srun_takes_an_allocation_or_makes_one(tmp_path: Path, in_job: bool) -> None:
    slurm = SlurmConfig(partition="gpu", account="lm", time="30", signal_seconds=60, extra=("--comment=x",))
    command = srun_command(
        LaunchProfile(python="p", modules=("cuda",), slurm=slurm), 3, 8, tmp_path, tmp_path, in_job=in_job
    )
    words = list(command.words)
    at = words.index("bash")
    options, shell = words[:at], words[at:]
    assert options[0] == "srun" and {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} <= set(options)
    assert ("--overlap" in options) == in_job and command.is_queued != in_job and command.node_ranks == (0, 1, 2)
    asked = {"--partition=gpu", "--account=lm", "--time=30", "--gres=gpu:8", "--exclusive", "--comment=x"}
    assert asked & set(options) == (set() if in_job else asked)
    assert shell[:3] == ["bash", "-l", "-c"] and shell[3].startswith("module load cuda && ")
    assert shell[3].endswith("exec p -m mempar.tools.doctor.node")


def test_modules_are_loaded_outside_of_a_container(tmp_path: Path) -> None:
    profile = LaunchProfile(modules=("cuda",), slurm=SlurmConfig(container_image="a.sqsh"))
    words = srun_command(profile, 2, 0, tmp_path, tmp_path, in_job=True).words
    assert words[:3] == ("bash", "-l", "-c") and "exec srun " in words[3]
    assert f"--container-mounts={tmp_path}:{tmp_path}" in words[3] and words[3].endswith(
        "python3 -m " + words[3].split()[-1]
    )


def test_nodes_that_do_not_answer_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across, "HELLO_SECONDS", 5.0)
    monkeypatch.setattr(across, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(across, "_LEAVE_SECONDS", 0.2)
    acts = ("fine", "lost", "crash", "slow", "deaf")
    # Other tests' processes go on.
    before = {child.pid for child in psutil.Process().children()}
    with Nodes(stubs(*acts), [f"h{rank}" for rank in range(len(acts))], 0.0) as nodes:
        pids = {child.pid for child in psutil.Process().children()} - before
        answers = nodes.ask(QUESTION)
    assert [one.name for one in answers] == ["stub0"]
    problems = {act: state.problem for act, state in zip(acts, nodes.states, strict=True)}
    assert problems["fine"] == "" and problems["lost"] == "ssh: connect to host: refused"
    assert problems["crash"] == "ImportError: no libcuda" and problems["slow"].startswith("no answer within 1 s")
    assert problems["deaf"] == "no answer within 5 s; the last that was heard: some chatter of a login shell"
    assert nodes.states[1].name == "h1" and nodes.states[2].name == "stub2"
    assert len(pids) >= len(acts) and not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("acts", "trial", "errors", "named"),
    [
        (("fine", "lost"), "", {"nodes.reached"}, "h1: ssh: connect to host: refused"),
        (("fine", "blind"), "", {"nodes.directory"}, "as seen from stub1 it is not there"),
        (("fine", "fine"), "node stub1 is apart; they meet; see why", {"smoke.collectives"}, "node stub1 is apart"),
        (("fine", "fine"), "die", {"smoke.collectives"}, "was lost while collectives were tried out: killed"),
    ],
)
def test_every_failure_is_a_finding(
    tmp_path: Path, acts: tuple[str, ...], trial: str, errors: set[str], named: str
) -> None:
    found = look_together(site(stubs(*acts, trial=trial)), Needs(), tmp_path / "run", 1, lambda what: None)
    wrong = [one for one in found if one.level == ERROR]
    assert {one.check for one in wrong} == errors and named in wrong[0].what
    if errors != {"smoke.collectives"}:
        (untried,) = [one for one in found if one.check == "smoke.collectives"]
        assert untried.level == NOTE
    assert not list(tmp_path.iterdir())


def test_one_that_says_nothing_behind_a_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across, "HELLO_SECONDS", 0.0)
    waiting = NodeCommand(words=("sh", "-c", "sleep 0.5; exit 3"), node_ranks=(0, 1), is_queued=True)
    with Nodes([waiting], ["n1", "n2"], 0.0) as nodes:
        assert nodes.ask(QUESTION) == []
    assert {state.problem for state in nodes.states} == {"sh ended with status 3"}


def test_a_node_ends_with_its_connection() -> None:
    """Also where SIGINT is ignored, as a shell has it for what it puts in the background."""
    node = shlex.join([sys.executable, "-m", "mempar.tools.doctor.node", "--node-rank", "4", "--node", "n5"])
    command = ["sh", "-c", f"trap '' INT; exec {node}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as node:
        assert node.stdin is not None and node.stdout is not None
        assert Inbox().hear(node.stdout.readline()) == (4, HELLO, {"name": "n5"})
        node.stdin.close()
        assert eventually(lambda: node.poll() is not None) and node.returncode == 130


def test_the_shared_directory_is_removed_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(nodes: Nodes, question: Question) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(together.Nodes, "ask", interrupt)
    monkeypatch.setattr(across, "_LEAVE_SECONDS", 0.2)
    with pytest.raises(KeyboardInterrupt):
        look_together(site(stubs("fine", "slow")), Needs(), tmp_path, 1, lambda what: None)
    assert not list(tmp_path.iterdir())
