"""mempar.tools.study.schedule, command and options: runs side by side, done once, gone on with, or failed."""

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from full_disk import full_disk
from mempar.errors import ConfigError, MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import lock
from mempar.runtime.launch.lock import RunLock, share_lock
from mempar.runtime.overrides import load_yaml
from mempar.tools.study import corpus, schedule
from mempar.tools.study.directory import needs_room
from mempar.tools.study.schedule import Ending, Planned, check_ending, run_all
from mempar.tools.study.variants import Entrant

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs be stubs."""
    monkeypatch.setattr(schedule, "_WORKER", "study_stub")
    monkeypatch.setattr(schedule, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def planned(root: Path, *variants: str, seeds: int = 1) -> list[Planned]:
    return [
        Planned(
            entrant=Entrant(variant=variant, slots=0),
            run=RunConfig(name=f"{variant}-seed{seed}"),
            root=root / f"{variant}-seed{seed}",
            corpus=root / "corpus",
            asked=10,
            evaluation_interval=2,
        )
        for seed in range(1, seeds + 1)
        for variant in variants
    ]


def starts(runs: list[Planned]) -> list[int]:
    """How often each run was started."""
    return [len(path.read_text()) if (path := one.root / "started").exists() else 0 for one in runs]


def stop_when(condition: Callable[[], bool]) -> threading.Thread:
    """Send SIGTERM to this process when something is seen."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_runs_are_done_once_and_leave_no_weights(tmp_path: Path) -> None:
    said: list[str] = []
    runs = planned(tmp_path, "dense", "memory", seeds=2)
    assert run_all(runs, 2, keep_models=False, say=said.append) == Ending(stopped="", failed={})
    assert starts(runs) == [1] * 4 and len(said) == 4 and said[-1].startswith("4 of 4: ")
    assert not [one for one in runs if (one.root / "checkpoints").exists()]
    # What is done is not done again, and what came back is.
    (runs[1].root / "result.json").unlink()
    assert run_all(runs, 2, keep_models=True, say=said.append).failed == {}
    assert starts(runs) == [1, 2, 1, 1] and (runs[1].root / "checkpoints").exists()
    assert said[-1].startswith("4 of 4: memory-seed1, 0.100 recalled")


def test_run_that_fails_keeps_no_other_from_running_and_is_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    runs = planned(tmp_path, "peer", "dense", "memory")
    ending = run_all(runs, 1, keep_models=False, say=said.append)
    assert ending.failed == {"peer-seed1": "status 3: the disk is full"}
    assert [one.is_done for one in runs] == [False, True, True]
    assert f"peer-seed1 failed with status 3; see {runs[0].root / 'log'}" in said
    with pytest.raises(MemparError, match=r"peer-seed1 failed \(status 3: the disk is full\)") as error:
        check_ending(ending)
    assert error.value.exit_status == 1
    run_all(runs, 1, keep_models=False, say=said.append)
    assert starts(runs) == [2, 1, 1]


def test_study_that_is_ended_lets_runs_save_and_goes_on(tmp_path: Path) -> None:
    runs = planned(tmp_path, "moe", "dense", "memory", seeds=2)
    watching = stop_when(lambda: (runs[0].root / "waiting").exists())
    ending = run_all(runs, 1, keep_models=False, say=print)
    watching.join()
    assert ending == Ending(stopped="SIGTERM", failed={})
    assert (runs[0].root / "ended").exists() and starts(runs) == [1, 0, 0, 0, 0, 0]
    # It goes on, and so do the others.
    (runs[3].root / "ended").touch()
    assert run_all(runs, 1, keep_models=False, say=print) == Ending(stopped="", failed={})
    assert starts(runs) == [2, 1, 1, 1, 1, 1]


def test_run_that_is_being_started_at_a_signal_is_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = planned(tmp_path, "moe", "dense")
    start, told = Planned.start, []

    def start_and_interrupt(one: Planned) -> subprocess.Popen[bytes]:
        process = start(one)
        terminate = process.terminate
        monkeypatch.setattr(process, "terminate", lambda: (told.append(one.root.name), terminate()))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(Planned, "start", start_and_interrupt)
    ending = run_all(runs, 2, keep_models=False, say=print)
    assert ending == Ending(stopped="SIGTERM", failed={}) and told == ["moe-seed1"]
    assert not [one for one in runs if one.is_done] and starts(runs)[1] == 0


def test_signal_while_the_next_run_is_chosen_lets_runs_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Interrupted(list[Planned]):
        """Looked at when a signal comes."""

        def __bool__(self) -> bool:
            waits = len(self) > 0
            os.kill(os.getpid(), signal.SIGTERM)
            return waits

    class Interrupting(schedule._Schedule):
        def goes_on(self, jobs: int) -> bool:
            if self.running and (self.running["moe-seed1"][0].root / "waiting").exists() and not self.stopped:
                jobs, self.waiting = 2, Interrupted(self.waiting)
            return super().goes_on(jobs)

    monkeypatch.setattr(schedule, "_Schedule", Interrupting)
    runs = planned(tmp_path, "moe", "dense")
    assert run_all(runs, 1, keep_models=False, say=print) == Ending(stopped="SIGTERM", failed={})
    assert (runs[0].root / "ended").exists() and not [one for one in runs if one.is_done]


def test_run_has_one_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.05)
    runs = planned(tmp_path, "dense", "moe")
    # A study that was killed has left a run that has not ended yet.
    runs[1].root.mkdir(parents=True)
    left = share_lock(runs[1].root)
    assert left is not None
    with pytest.raises(ConfigError, match=rf"{runs[1].root} is in use: the ranks of"):
        run_all(runs, 2, keep_models=False, say=print)
    left.close()
    assert starts(runs) == [0, 0]
    refused: list[str] = []

    def is_refused() -> bool:
        if not (runs[1].root / "waiting").exists():
            return False
        try:
            with RunLock(runs[1].root, print):
                return True
        except ConfigError as error:
            refused.append(str(error))
            return True

    watching = stop_when(is_refused)
    assert run_all(runs, 2, keep_models=False, say=print).stopped == "SIGTERM"
    watching.join()
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    with RunLock(runs[1].root, print):
        pass


def test_run_whose_study_is_gone_ends_before_it_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (one,) = planned(tmp_path, "dense")
    one.prepare()
    process = one.start()
    process.wait()
    assert isinstance(process.args, list) and process.args[-2:] == ["--parent", str(os.getpid())]
    # It would fail for want of a corpus.
    monkeypatch.setattr(schedule, "_WORKER", "mempar.tools.study.one_run")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (one.root / "log").unlink()
    assert one.start().wait() == 1 and (one.root / "log").read_text() == ""


def test_run_of_a_study_that_was_moved_goes_on(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    data = {root: corpus.data_of(root / "corpus") for root in (before, after)}
    ((one,), (other,)) = (planned(root, "dense") for root in (before, after))
    one = dataclasses.replace(one, run=dataclasses.replace(one.run, data=data[before]))
    one.prepare()
    before.rename(after)
    other = dataclasses.replace(other, run=dataclasses.replace(other.run, data=data[after]))
    other.prepare()
    assert load_yaml(other.root / "config.yaml").data == data[after]
    assert json.loads((other.root / "entrant.json").read_text())["corpus"] == str(after / "corpus")


def test_run_whose_directory_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (one,) = planned(tmp_path, "dense")
    one.prepare()
    (one.root / "entrant.json").unlink()
    (one.root / "entrant.json").mkdir()
    with pytest.raises(ConfigError, match=r"dense-seed1/entrant\.json cannot be used \(Is a directory\)"):
        one.prepare()


def test_full_disk_is_one_message_that_names_the_place(tmp_path: Path) -> None:
    message = rf"{tmp_path} cannot be used \(File too large\); .* make room"
    with full_disk(), pytest.raises(ConfigError, match=message), needs_room(tmp_path):
        (tmp_path / "some").write_bytes(b"content")


def test_progress_is_read_from_signs_of_life(tmp_path: Path) -> None:
    from mempar.runtime.launch.heartbeat import Heartbeat, Phase

    (one,) = planned(tmp_path, "dense")
    assert one.steps_done == 0
    signs = Heartbeat(one.root / "ranks")
    signs.mark(Phase.DATA, 7)
    assert one.steps_done == 6 and signs.path is not None


def test_another_run_in_its_directory_is_refused(tmp_path: Path) -> None:
    (one,) = planned(tmp_path, "dense")
    run_all([one], 1, keep_models=False, say=print)
    (one.root / "result.json").unlink()
    other = dataclasses.replace(one, run=dataclasses.replace(one.run, optim=dataclasses.replace(one.run.optim, lr=0.5)))
    with pytest.raises(ConfigError, match=r"optim.lr is 0.0001 there and 0.5 here"):
        run_all([other], 1, keep_models=False, say=print)
    assert json.loads((one.root / "entrant.json").read_text())["variant"] == "dense"
