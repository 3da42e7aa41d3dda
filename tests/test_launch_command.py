"""`mempar launch` up to the point where nodes start, and on this machine; tests/cluster has ssh and SLURM."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from config_samples import BASE
from mempar.errors import ConfigError, DamagedError, MemparError
from mempar.recipes import find_recipe
from mempar.runtime.launch import words
from mempar.runtime.overrides import load_yaml, override
from mempar.runtime.run_dir import RunDir
from mempar.tools.launch import command, restarts
from mempar.tools.launch.command import Request, launch
from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.nodes_wanted import nodes_wanted
from mempar.tools.launch.places import given_flags
from mempar.tools.launch.profile import LaunchProfile, SshConfig
from mempar.tools.launch.ssh import SshLaunch, commands, run_over_ssh

SMALLER = ("parallel.mp=8", "parallel.mp_rows=8", "parallel.mp_hops=1")
LARGE = "1.3b_memory_plus_64m_64xh200_bf16"


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are there, whatever the recipe names."""
    monkeypatch.setattr(command, "with_data", lambda run, say: run)


def a_request(place: str, out: Path, recipe: str = "smoke", **settings: object) -> Request:
    profile = settings.pop("profile", LaunchProfile())
    return Request(recipe=recipe, place=place, profile=profile, out=out, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("assignments", "nodes", "per_node", "at_most", "expected"),
    [
        ((), None, None, 1, (1, 1)),
        (("parallel.mp=6",), None, None, 1, (1, 6)),
        (("parallel.mp=6",), 3, None, None, (3, 2)),
        (("parallel.mp=6",), None, 2, None, (3, 2)),
        ((), 2, 4, None, (2, 4)),
    ],
)
def test_nodes_follow_from_the_layout_where_they_are_not_given(
    assignments: tuple[str, ...],
    nodes: int | None,
    per_node: int | None,
    at_most: int | None,
    expected: tuple[int, int],
) -> None:
    run = override(BASE, [*assignments, "model.hidden_size=48", "memory.column_tile=8"])
    assert nodes_wanted(run, nodes=nodes, per_node=per_node, at_most=at_most) == expected


def test_recipes_fill_nodes_of_eight() -> None:
    run = find_recipe(LARGE)
    assert nodes_wanted(run, nodes=None, per_node=None, at_most=None) == (8, 8)
    assert nodes_wanted(run, nodes=16, per_node=None, at_most=None) == (16, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0, "per_node": None, "at_most": None}, "--nodes=0 must be at least 1"),
        ({"nodes": None, "per_node": -1, "at_most": None}, "--nproc-per-node=-1 must be at least 1"),
        ({"nodes": None, "per_node": 0, "at_most": 1}, "--nproc-per-node=0 must be at least 1"),
        ({"nodes": 2, "per_node": None, "at_most": 1}, "this machine is 1 node; use --on ssh"),
    ],
)
def test_numbers_of_nodes_that_cannot_be_are_refused(settings: dict[str, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nodes_wanted(find_recipe(LARGE), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": "k8s"}, "--on k8s is no place to run; it is one of local, ssh, slurm"),
        ({"place": "ssh"}, "--on ssh needs --hostfile"),
        ({"place": "slurm", "hostfile": Path("hosts")}, "--on slurm takes no --hostfile"),
        ({"place": "local", "max_restarts": -1}, "--max-restarts -1 is negative"),
        ({"place": "slurm", "port": 80}, "--port 80 must be from 1024"),
        (
            {"place": "local", "flags": ("--module", "--env")},
            "--module, --env with --on local, where nothing heeds them",
        ),
        ({"place": "ssh", "hostfile": Path("hosts"), "flags": ("--time",)}, "--time is for --on slurm"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    place = str(settings.pop("place"))
    with pytest.raises(ConfigError, match=message):
        a_request(place, tmp_path / "run", **settings)


def test_flags_that_were_given_are_named() -> None:
    assert given_flags(container_image="x", module=["a"], env=[], time=None, port=2000) == (
        "--container-image",
        "--module",
        "--port",
    )


def test_ranks_that_nodes_cannot_share_out_are_refused() -> None:
    run = override(BASE, ["parallel.mp=6", "model.hidden_size=48"])
    with pytest.raises(ConfigError, match="--nodes 4 for the 6 ranks"):
        nodes_wanted(run, nodes=4, per_node=None, at_most=None)


def test_dry_run_shows_the_batch_script_and_writes_nothing(
    ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No scheduler is needed for it.
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    root = launch(a_request("slurm", tmp_path / "run", LARGE, dry_run=True), said.append)
    shown = "\n".join(said)
    assert "#SBATCH --nodes=8" in shown and "--nproc\n  8" in shown and str(root) in shown
    assert "memory of a rank" in shown and "GPU" in shown
    assert list(tmp_path.iterdir()) == []


def test_dry_run_over_ssh_shows_a_command_for_every_host(ready: None, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=2\nbeta slots=2\n")
    profile = LaunchProfile(env={"NCCL_DEBUG": "WARN; rm -rf"}, ssh=SshConfig(user="trainer", port=2200))
    request = a_request(
        "ssh", tmp_path / "a run", hostfile=hostfile, profile=profile, assignments=("parallel.mp=4",), dry_run=True
    )
    said: list[str] = []
    launch(request, said.append)
    (first, second) = [line for line in said if line.startswith("ssh ")]
    assert "-l trainer -p 2200" in first and " alpha " in first and "--node-rank 0" in first
    assert " beta " in second and "--node-rank 1" in second
    assert "--rendezvous alpha:" in second and "--nodes 2 --nproc 2" in second and "BatchMode=yes" in second
    # A shared connection may lack what tells of a lost link.
    assert "ControlPath=none" in second
    assert not (tmp_path / "a run").exists()


def test_dry_run_without_data_shows_all_and_is_refused(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"this launch would be refused: .*are not there"):
        launch(a_request("slurm", tmp_path / "run", LARGE, dry_run=True), said.append)
    assert any("#SBATCH" in text for text in said)


def test_run_that_does_not_fit_its_gpus_is_refused(ready: None, tmp_path: Path) -> None:
    request = a_request("slurm", tmp_path / "run", LARGE, nodes=1, assignments=SMALLER)
    with pytest.raises(ConfigError, match=r"needs \d+\.\d GiB a GPU on 8 ranks .* has 140\.4 GiB"):
        launch(request, print)


def test_without_a_scheduler_nothing_is_written(ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        launch(a_request("slurm", tmp_path / "run"), print)
    assert not (tmp_path / "run").exists()


def stub(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_job_is_written_before_it_is_submitted(ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "sbatch", f'cp "$2" {tmp_path}/submitted; echo 4711')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    said: list[str] = []
    root = launch(a_request("slurm", tmp_path / "run", assignments=("parallel.mp=2",), nodes=2), said.append)
    assert (tmp_path / "submitted").read_text() == (root / "launch" / "job.sbatch").read_text()
    assert said[-1].startswith("job 4711 is submitted")
    assert load_yaml(root / "config.yaml").parallel.mp == 2
    assert json.loads((root / "launch" / "start.json").read_text()) == {"from": None}
    assert {"profile.yaml", "job.sbatch", "start.json"} <= {path.name for path in (root / "launch").iterdir()}
    # A second launch into the same directory is another run.
    with pytest.raises(ConfigError, match="holds a run already"):
        launch(a_request("slurm", root, assignments=("parallel.mp=2",), nodes=2), print)
    stub(tmp_path / "bin", "sbatch", 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    with pytest.raises(ConfigError, match=r"invalid partition.*launch again with --resume --out"):
        launch(a_request("slurm", root, assignments=("parallel.mp=2",), nodes=2, resume=True), print)


def test_run_whose_start_cannot_be_written_is_none_to_continue(
    ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else --resume would begin it from nothing, where it was to start from a checkpoint."""

    def fail(paths: RunDir, load: Path | None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "record_start", fail)
    with pytest.raises(ConfigError, match="No space left"):
        launch(a_request("local", tmp_path / "run"), print)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is not an empty directory"):
        launch(a_request("local", tmp_path / "run", resume=True), print)


def test_dry_run_refuses_to_continue_another_run(ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_node", lambda *arguments, **more: None)
    launch(a_request("local", tmp_path / "run"), print)
    again = replace(a_request("local", tmp_path / "run", resume=True), dry_run=True)
    launch(again, print)
    said: list[str] = []
    launch(replace(again, out=tmp_path / "none"), said.append)
    assert f"{tmp_path / 'none'} holds no run to continue: a new one begins there" in said
    with pytest.raises(ConfigError, match="--nproc-per-node=0 must be at least 1"):
        launch(replace(again, per_node=0), print)
    with pytest.raises(ConfigError, match=r"holds another run: train\.seed is"):
        launch(replace(again, assignments=("train.seed=5",)), print)


def test_run_on_this_machine_is_started_again_after_a_failure(
    ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_PAUSE_SECONDS", 0.0)
    started: list[list[str]] = []

    def run_node(root: Path, node: object, arguments: list[str], say: Callable[[str], None], also: object) -> None:
        started.append(arguments)
        if len(started) < 3:
            raise MemparError("rank 0 was killed.")

    monkeypatch.setattr(command, "run_node", run_node)
    said: list[str] = []
    with pytest.raises(MemparError, match="rank 0 was killed"):
        launch(a_request("local", tmp_path / "once", max_restarts=1), said.append)
    assert len(started) == 2
    launch(a_request("local", tmp_path / "again", max_restarts=1), said.append)
    assert started == [["--go-on"]] * 3
    assert said.count("rank 0 was killed.\nrestart 1 of 1, from the last good checkpoint") == 1


@pytest.mark.parametrize("error", [ConfigError("it is wrong."), DamagedError("all are damaged."), KeyboardInterrupt()])
def test_what_no_restart_mends_is_not_started_again(error: BaseException) -> None:
    started: list[int] = []

    def start(number: int) -> None:
        started.append(number)
        raise error

    with pytest.raises(type(error)):
        restarts.with_restarts(start, 5, print)
    assert started == [0]


def test_pauses_before_restarts_grow_up_to_a_limit() -> None:
    pauses = [restarts.pause_seconds(number) for number in (1, 2, 3, 7, 8, 100_000)]
    assert pauses == [3.0, 6.0, 12.0, 192.0, 300.0, 300.0]


def test_what_was_told_to_end_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_PAUSE_SECONDS", 0.0)
    started: list[int] = []

    def start(number: int) -> None:
        started.append(number)
        raise MemparError("rank 0 could not save.")

    with pytest.raises(MemparError, match="could not save"):
        restarts.with_restarts(start, 5, print, lambda: len(started) == 2)
    assert started == [0, 1]


def test_sigterm_between_two_starts_ends_the_launch() -> None:
    started: list[int] = []
    said: list[str] = []

    def start(number: int) -> None:
        started.append(number)
        raise MemparError("rank 0 was killed.")

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    restarts.with_restarts(start, 5, said.append)
    timer.join()
    assert started == [0]
    assert said[-1].startswith("ended by SIGTERM while nothing was running")


def ssh_launch(tmp_path: Path, agent: str) -> SshLaunch:
    """A launch whose ssh runs a script in place of the agents."""
    stub(tmp_path, "ssh", agent)
    hosts = tuple(Host(name=name, slots=1) for name in ("alpha", "beta"))
    return SshLaunch(hosts=hosts, run_dir=tmp_path, workdir=tmp_path, profile=LaunchProfile(), port=29500, attempt="1")


@pytest.fixture
def here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("mempar.tools.launch.ssh._GRACE_SECONDS", 1.0)


# What an agent says that ends well.
DONE = f"""echo '{words._VERDICT}{json.dumps({"status": 0, "text": ""})}'"""
HOST = "for word; do case $word in alpha|beta) host=$word;; esac; done\n"


def test_output_of_hosts_has_their_names(tmp_path: Path, here_first: None) -> None:
    said: list[str] = []
    run_over_ssh(ssh_launch(tmp_path, f"{HOST}echo step 1 on $host; {DONE}"), said.append)
    assert sorted(said) == ["[alpha] step 1 on alpha", "[beta] step 1 on beta"]


def test_a_lost_host_ends_the_others_and_is_named(tmp_path: Path, here_first: None) -> None:
    agent = f"{HOST}[ $host = beta ] && {{ echo 'kex: Connection reset by peer'; exit 255; }}\n" + (
        'while read -r word; do echo "heard $word"; [ "$word" = KILL ] && exit 1; done'
    )
    said: list[str] = []
    with pytest.raises(MemparError, match=r"connection to .*beta was lost \(ssh: kex: Connection reset") as failure:
        run_over_ssh(ssh_launch(tmp_path, agent), said.append)
    assert failure.value.exit_status == 1
    assert "[alpha] heard beat" in said and "[alpha] heard KILL" in said


@pytest.mark.parametrize("status", [0, 1])
def test_an_agent_that_ends_without_a_word_was_reached_but_did_not_run(
    tmp_path: Path, here_first: None, status: int
) -> None:
    agent = f"{HOST}[ $host = beta ] && {{ echo 'No module named mempar'; exit {status}; }}\n" + (
        'while read -r word; do [ "$word" = KILL ] && exit 1; done'
    )
    with pytest.raises(MemparError, match=rf"on beta \(status {status}\), after: No module named mempar; every host"):
        run_over_ssh(ssh_launch(tmp_path, agent), print)


def test_a_connection_that_stays_open_after_the_verdict_is_closed(
    tmp_path: Path, here_first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sshd keeps one for a daemon that a line of `setup` started."""
    monkeypatch.setattr("mempar.tools.launch.ssh._LEAVE_SECONDS", 0.3)
    began = time.monotonic()
    run_over_ssh(ssh_launch(tmp_path, f"{DONE}; exec sleep 30"), print)
    assert time.monotonic() - began < 10.0


def test_output_that_nobody_takes_does_not_stop_a_run(tmp_path: Path, here_first: None) -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    # More than a pipe holds.
    run_over_ssh(ssh_launch(tmp_path, f"{HOST}yes | head -n 40000; {DONE}"), say)


def test_refusal_of_one_host_is_that_of_the_launch(tmp_path: Path, here_first: None) -> None:
    verdict = f"{words._VERDICT}{json.dumps({'status': 2, 'text': 'port 29500 cannot be used.'})}"
    agent = f"{HOST}[ $host = alpha ] && {{ echo '{verdict}'; exit 2; }}\n" + (
        'while read -r word; do [ "$word" = KILL ] && exit 1; done'
    )
    with pytest.raises(ConfigError, match=r"^port 29500 cannot be used\.$"):
        run_over_ssh(ssh_launch(tmp_path, agent), print)


def test_remote_command_survives_any_shell_and_any_name(tmp_path: Path) -> None:
    """What ssh hands to a shell runs as it was meant, quotes, blanks and dollars in names included."""
    odd = tmp_path / "it's $HOME; a run"
    odd.mkdir()
    setup = ("false || SAID='it is'", 'echo "$SAID" ready  # of all')
    profile = LaunchProfile(python="/bin/echo", env={"NAME": "a 'b' $c"}, setup=setup)
    made = SshLaunch(
        hosts=(Host(name="alpha", slots=3),), run_dir=odd, workdir=odd, profile=profile, port=29500, attempt="1"
    )
    ((*_, remote),) = commands(made)
    done = subprocess.run(["sh", "-c", remote], capture_output=True, text=True, check=True)
    ready, echoed = done.stdout.splitlines()
    assert ready == "it is ready"
    assert echoed.startswith(f"-m mempar.runtime.launch.node {odd} --nodes 1 --nproc 3")


def test_help_of_launch_names_its_places() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mempar.cli import main; main()", "launch", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "local, ssh or slurm" in done.stdout
