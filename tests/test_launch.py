"""Starting ranks and seeing them end: signals, one message whatever happens to a rank, nothing left behind.

Ranks are fakes (fake_rank.py), so what is tested is mempar.runtime.launch: local, supervisor and the frame of
worker; real ranks end in test_run_endings.py.
"""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mempar.errors import MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import local as launch
from mempar.runtime.launch import supervisor, worker
from mempar.runtime.launch.heartbeat import Phase, read_signs
from mempar.runtime.overrides import to_yaml

TESTS = Path(__file__).parent


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Launches ranks that act, in a process of which only they are children; returns what was said."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    monkeypatch.setattr(supervisor, "_SUSPECT_SECONDS", 3.0)
    monkeypatch.setattr(supervisor, "_SLACK_SECONDS", 1.0)

    def start(*acts: str) -> list[str]:
        run = RunConfig()
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, collective_timeout=1))
        (tmp_path / "config.yaml").write_text(to_yaml(run))
        (tmp_path / "act.json").write_text(json.dumps(acts))
        said: list[str] = []
        try:
            launch.launch_local(tmp_path, len(acts), None, said.append, worker="fake_rank")
        finally:
            ranks = [child for child in psutil.Process().children() if "fake_rank" in " ".join(child.cmdline())]
            assert not ranks
        assert not (tmp_path / "ranks").exists()
        return said

    return start


def once(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    """Do something from the side when something has come to pass."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def are_in(tmp_path: Path, num_ranks: int, phase: Phase) -> Callable[[], bool]:
    return lambda: [sign.phase for sign in read_signs(tmp_path / "ranks")] == [phase] * num_ranks


def test_worker_refuses_a_missing_directory_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The parent-death signal is for real ranks: this process must survive its own test.
    monkeypatch.setattr(worker, "die_with", lambda parent: None)
    monkeypatch.setattr(worker, "ignore_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "none")])
    assert worker.main() == 2
    assert "does not exist" in capsys.readouterr().err


def fake_worker(directory: Path, preexec: Callable[[], None] | None = None) -> tuple[int, str]:
    """Status and words of a rank whose launcher is this process."""
    command = [sys.executable, str(TESTS / "fake_rank.py"), str(directory), "--launcher", str(os.getpid()), "--rank=0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=preexec)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("act", "status", "said"),
    [
        ("refuse", 2, r"mempar: model.hidden_size=7 is odd; it must be even; use 8\.\n"),
        ("raise", 1, r"Traceback (?!.*During handling).*\nValueError: a number went missing\n\n"),
    ],
)
def test_rank_says_itself_what_it_cannot_leave_behind(tmp_path: Path, act: str, status: int, said: str) -> None:
    (tmp_path / "act.json").write_text(json.dumps([act]))
    # In the place of the file that it would write for its launcher.
    (tmp_path / "ranks" / "rank_00000.failed.txt").mkdir(parents=True)
    returned, words = fake_worker(tmp_path)
    assert returned == status
    assert re.fullmatch(said, words, re.DOTALL), words


def test_rank_that_is_told_to_stop_while_it_leaves_ends_well(tmp_path: Path) -> None:
    (tmp_path / "act.json").write_text('["hear late"]')
    (tmp_path / "ranks").mkdir()
    assert fake_worker(tmp_path) == (0, "")


def test_rank_on_a_full_disk_ends_with_one_message(tmp_path: Path) -> None:
    returned, words = fake_worker(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert returned == 1
    assert re.fullmatch(r"mempar: \S+\.life cannot be written \(.+\); .* continue with --resume\.\n", words), words


def test_launch_refuses_where_ranks_cannot_give_signs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    (tmp_path / "ranks").touch()
    with pytest.raises(MemparError, match=r"ranks cannot be written \(.+\); ranks give signs of life there"):
        launch.launch_local(tmp_path, 1, None, print)


def test_launch_passes_on_that_ranks_refused(
    start: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MemparError, match=r"^model.hidden_size=7 is odd; it must be even; use 8\.$") as failure:
        start("refuse", "refuse")
    assert failure.value.exit_status == 2
    # The command line prints the message; the ranks do not.
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("before", "within"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_ranks_wait_without_spinning_and_the_launcher_keeps_its_environment(
    start: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    before: str | None,
    within: str,
    num_ranks: int,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    start(*["show environment"] * num_ranks)
    assert [(tmp_path / f"policy_{rank}").read_text() for rank in range(num_ranks)] == [within] * num_ranks
    assert os.environ.get("OMP_WAIT_POLICY") == before


def test_launch_names_the_status_of_a_rank_that_never_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MemparError, match="rank 0 ended with status 1 before the first step") as failure:
        launch.launch_local(tmp_path, 1, None, print)
    assert failure.value.exit_status == 1


HOST = re.escape(os.uname().nodename)


@pytest.mark.parametrize(
    ("acts", "message"),
    [
        (["kill"], rf"rank 0 on {HOST} was killed by signal 9 \(SIGKILL; .* memory runs out\) at step 41 \(forward-b"),
        (["wait", "kill"], rf"rank 1 on {HOST} was killed by signal 9 \(SIGKILL; .*\) at step 40 \(forward-backward\)"),
        (["wait", "leave"], rf"rank 1 on {HOST} ended with status 7 at step 40 "),
        (["wait", "raise"], rf"rank 1 on {HOST} failed at step 40 .*: ValueError: a number went missing; .*rank_00001"),
        (["wait", "stop"], rf"rank 1 on {HOST} is stopped \(SIGSTOP\): its last sign of life is step 40 "),
        (["wait", "loop"], rf"rank 1 on {HOST} hangs: its last sign of life is step 40 .*; see where it was in "),
        (["loop"], rf"rank 0 on {HOST} hangs: its last sign of life is step 41 .*; see where it was in "),
        (["stop"], rf"rank 0 on {HOST} is stopped \(SIGSTOP\): .* ago; a run cannot go on"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_one_message_names_the_rank_and_the_cause(
    start: Callable[..., list[str]], tmp_path: Path, acts: list[str], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(MemparError, match=message) as failure:
        start(*acts)
    assert time.monotonic() - started < 1.0 + 30.0
    assert failure.value.exit_status == 1
    if "loop" in acts:
        stack = Path(re.findall(r"where it was in (\S+),", str(failure.value))[0])
        assert "in endless_loop" in stack.read_text()
    if "raise" in acts:
        assert "Traceback" in (tmp_path / "ranks" / "rank_00001.failed.txt").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_signal_to_the_launcher_lets_all_ranks_save(
    start: Callable[..., list[str]], tmp_path: Path, name: str, num_ranks: int
) -> None:
    def send() -> None:
        os.kill(os.getpid(), signal.Signals[name])
        if name == "SIGTERM":
            # A second one does not lose the save.
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = once(are_in(tmp_path, num_ranks, Phase.FORWARD_BACKWARD), send)
    assert start(*["go on"] * num_ranks) == []
    thread.join()
    assert all((tmp_path / f"saved_{rank}").exists() for rank in range(num_ranks))


def test_second_interrupt_ends_ranks_at_once(start: Callable[..., list[str]], tmp_path: Path) -> None:
    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = once(are_in(tmp_path, 1, Phase.FORWARD_BACKWARD), send)
    with pytest.raises(KeyboardInterrupt):
        start("loop")
    thread.join()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_signal_before_the_first_step_ends_at_once(
    start: Callable[..., list[str]], tmp_path: Path, num_ranks: int
) -> None:
    thread = once(are_in(tmp_path, num_ranks, Phase.STARTING), lambda: os.kill(os.getpid(), signal.SIGTERM))
    started = time.monotonic()
    said = start(*["start for ever"] * num_ranks)
    assert time.monotonic() - started < 20.0
    assert [text.split(",")[0] for text in said] == ["ended by SIGTERM before the first step"]
    thread.join()
