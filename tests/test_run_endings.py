"""How real runs end: each with its exit status and one message, nothing left behind, and the next one goes on at once.

What launchers do about ranks is tested with fakes in test_launch.py. The first run is killed, stopped and told to end
again and again, and continued every time.
"""

import dataclasses
import datetime
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import test_train
from mempar.errors import MemparError
from mempar.runtime import bringup
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import endings
from mempar.runtime.launch.heartbeat import Sign, read_signs
from mempar.runtime.launch.local import launch_local
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.overrides import load_yaml, to_yaml
from mempar.runtime.run_dir import RunDir, open_existing, open_new
from mempar.runtime.train import Trainer
from rank_pool import RankPool
from test_train import toy

TESTS = Path(__file__).parent
MEMPAR = Path(sys.executable).with_name("mempar")
# Longer than the ranks of a busy machine are apart when they start.
TIMEOUT = 8
paths = test_train.paths


def endless(paths: tuple[str, ...]) -> RunConfig:
    run = toy(paths, dtype="float32", mp=2)
    train = dataclasses.replace(
        run.train, steps=10**6, save_interval=0, heldout_samples=0, collective_timeout=TIMEOUT, log_interval=1
    )
    return dataclasses.replace(run, train=train, memory=dataclasses.replace(run.memory, usage_interval=0))


class Running:
    """`mempar train` in a process of its own, until its end."""

    def __init__(self, recipe: Path, root: Path) -> None:
        self.root, self.recipe = root, recipe
        self.process = subprocess.Popen(
            [MEMPAR, "train", str(recipe), "--out", str(root), "--resume"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ranks: list[psutil.Process] = []

    def signs_after(self, num_steps: int) -> list[Sign]:
        """Wait until every rank has done some steps."""
        first = 0
        while True:
            signs = [sign for sign in read_signs(self.root / "ranks") if psutil.pid_exists(sign.pid) and sign.step > 0]
            if len(signs) == 2:
                first = first or signs[0].step
                if min(sign.step for sign in signs) >= first + num_steps:
                    self.ranks = [psutil.Process(sign.pid) for sign in signs]
                    return signs
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60.0)
        assert not any(rank.is_running() for rank in self.ranks)
        return self.process.returncode, out, err


@pytest.fixture
def run_again(paths: tuple[str, ...], tmp_path: Path) -> Iterator[Callable[[], Running]]:
    """Starts the run, or goes on with it."""
    recipe = tmp_path / "endless.yaml"
    recipe.write_text(to_yaml(endless(paths)))
    runs: list[Running] = []

    def start() -> Running:
        runs.append(Running(recipe, tmp_path / "run"))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_run_ends_in_every_way_and_goes_on_at_once(
    run_again: Callable[[], Running], tmp_path: Path, note_figure: Callable[[str, float], None]
) -> None:
    # Told to end while a second writer tries to begin.
    run = run_again()
    run.signs_after(3)
    config = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    second = run_again()
    status, _, err = second.end()
    assert status == 2 and f"is in use: process {run.process.pid} on {os.uname().nodename}" in err
    assert err.count("\n") == 1
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == config
    started = time.monotonic()
    for _ in range(3):
        run.process.terminate()
        time.sleep(0.02)
    status, out, err = run.end()
    note_figure("seconds from SIGTERM to the end", time.monotonic() - started)
    step = RunDir(tmp_path / "run").latest_checkpoint()
    assert status == 0 and step is not None, err
    number = int(step.name.removeprefix("step_"))
    assert last_line(out) == f"ended by SIGTERM at step {number}, saved; continue with --resume"
    assert "Traceback" not in err

    # A rank is killed.
    run = run_again()
    signs = run.signs_after(3)
    assert min(sign.step for sign in signs) > number
    started = time.monotonic()
    os.kill(signs[1].pid, signal.SIGKILL)
    status, _, err = run.end()
    seconds = time.monotonic() - started
    note_figure("seconds from a rank's death to the end", seconds)
    assert status == 1 and seconds < 30.0
    assert re.match(r"mempar: rank 1 on \S+ was killed by signal 9 \(SIGKILL; .*\) at step \d+ ", last_line(err)), err
    assert "Traceback" not in err

    # A rank is stopped for ever.
    run = run_again()
    signs = run.signs_after(3)
    started = time.monotonic()
    os.kill(signs[0].pid, signal.SIGSTOP)
    status, _, err = run.end()
    seconds = time.monotonic() - started
    note_figure("seconds beyond collective_timeout from a rank's stop to the end", seconds - TIMEOUT)
    assert status == 1 and seconds < TIMEOUT + 30.0
    assert re.match(r"mempar: rank 0 on \S+ is stopped \(SIGSTOP\): .* step \d+ \(", last_line(err)), err
    assert "Traceback" not in err


KILLED_LAUNCHER = """
import sys
from pathlib import Path
from mempar.runtime.launch.local import launch_local
from mempar.runtime.launch.lock import RunLock
root = Path(sys.argv[1])
with RunLock(root, print):
    launch_local(root, 2, None, print, worker="fake_rank")
"""


def test_killed_launcher_takes_its_ranks_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note_figure: Callable[[str, float], None]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    (tmp_path / "act.json").write_text('["stop", "loop"]')
    launcher = subprocess.Popen([sys.executable, "-c", KILLED_LAUNCHER, str(tmp_path)])
    while [sign.step for sign in read_signs(tmp_path / "ranks")] != [41, 40]:
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = [psutil.Process(sign.pid) for sign in read_signs(tmp_path / "ranks")]
    launcher.kill()
    started = time.monotonic()
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() - started < 1.0
        time.sleep(0.01)
    note_figure("seconds from a launcher's death to its ranks'", time.monotonic() - started)
    launcher.wait()
    # It goes on at once.
    (tmp_path / "act.json").write_text('["end", "end"]')
    again = subprocess.run([sys.executable, "-c", KILLED_LAUNCHER, str(tmp_path)], check=False)
    assert again.returncode == 0


def test_diverged_copies_end_the_run_and_are_named(
    paths: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    run = toy(paths, dtype="float32", memory={"check_interval": 1})
    directory = open_new(tmp_path / "run", run)
    said = r"^copies differ after step 2: memory.values from slot 7 on, between ranks \[0\] and \[1\]"
    with pytest.raises(MemparError, match=said) as failure:
        launch_local(directory.root, 2, None, print, worker="spoiled_rank")
    assert failure.value.exit_status == 1
    assert "Traceback" not in capfd.readouterr().err


def stop_in(root: str, when: str, load: str | None) -> tuple[str, int]:
    """Train on this rank of the pool; rank 1 is told to stop. Returns what was agreed on, and when."""
    directory = RunDir(Path(root))
    run = load_yaml(directory.config)
    world = bringup.lay_out(run)
    stopping = Stopping()
    trainer = Trainer(run, world, directory, Path(load) if load else None, stopping)
    if world.rank == 1 and when == "start-up":
        stopping.wish("SIGTERM")
    elif world.rank == 1:
        owner, name = {
            "step 2": (trainer.stepper, "_schedule"),
            "evaluation": (trainer.heldout, "loss"),
            "save": (trainer, "save"),
            "last save": (trainer, "save"),
        }[when]
        method = getattr(owner, name)
        calls: list[int] = []

        def wish_and_go_on(*given: object, **named: object) -> object:
            calls.append(1)
            if len(calls) == {"step 2": 2, "last save": 2}.get(when, 1):
                stopping.wish("SIGTERM")
            return method(*given, **named)

        setattr(owner, name, wish_and_go_on)
    trainer.train()
    bringup.tear_down(world)
    return stopping.agreed, trainer.progress.step


@pytest.mark.parametrize(
    ("when", "heldout_samples", "agreed", "step", "saved"),
    [
        ("start-up", 12, "SIGTERM", 0, 0),
        ("evaluation", 12, "SIGTERM", 0, 0),
        ("step 2", 0, "SIGTERM", 2, 2),
        ("save", 0, "SIGTERM", 3, 3),
        ("last save", 12, "SIGTERM", 5, 5),
    ],
)
def test_signal_to_one_rank_stops_all_at_the_same_step(
    pool: RankPool,
    paths: tuple[str, ...],
    tmp_path: Path,
    when: str,
    heldout_samples: int,
    agreed: str,
    step: int,
    saved: int,
) -> None:
    run = toy(paths, mp=2)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, heldout_samples=heldout_samples))
    directory = open_new(tmp_path / "run", run)
    assert pool.run(2, stop_in, str(directory.root), when, None) == [(agreed, step)] * 2
    latest = directory.latest_checkpoint()
    assert latest == (directory.checkpoint(saved) if saved else None)
    rows = test_train.read_rows(directory.metrics)
    # An evaluation that was cut short says nothing.
    assert [row["step"] for row in rows if "heldout_loss" in row] == ([0] if when == "last save" else [])


def test_stopped_run_goes_on_bit_for_bit(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = toy(paths, mp=2)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, heldout_samples=0))
    whole = test_train.train(pool, run, tmp_path / "whole")
    directory = open_new(tmp_path / "parts", run)
    pool.run(2, stop_in, str(directory.root), "step 2", None)
    parts = test_train.train(pool, run, open_existing(directory.root, run).root, resume=True)
    for name in ("step", "loss", "grad_norm", "memory_grad_norm"):
        assert [row[name] for row in parts] == [row[name] for row in whole]


def run_out_of_time(root: str) -> tuple[str, int]:
    directory = RunDir(Path(root))
    run = load_yaml(directory.config)
    world = bringup.lay_out(run)
    stopping = Stopping()
    stopping.limit(time.time(), run.train.time_limit_minutes)
    trainer = Trainer(run, world, directory, None, stopping)
    trainer.train()
    bringup.tear_down(world)
    return stopping.agreed, trainer.progress.step


def test_time_limit_saves_before_it_is_over(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = endless(paths)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, time_limit_minutes=0.05))
    directory = open_new(tmp_path / "run", run)
    started = time.time()
    (agreed, step), other = pool.run(2, run_out_of_time, str(directory.root))
    assert (agreed, step) == other and agreed == "its time limit"
    latest = directory.latest_checkpoint()
    assert latest == directory.checkpoint(step) and step > 0
    # The pool's start is not counted; saving and leaving are.
    assert time.time() - started < 20.0


def fail_in_a_collective(directory: str) -> str:
    """Rank 0 waits for rank 1 in vain; returns what it takes that for."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    kind = ""
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.zeros(3), group=group)
        except Exception as error:
            kind = endings.record_failure(Path(directory), 0, error).kind
    return kind


def test_waiting_in_vain_is_no_fault_of_ones_own(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, fail_in_a_collective, str(tmp_path)) == ["collective", ""]


@pytest.mark.soak
def test_sigterm_at_any_moment_ends_the_run_well(
    run_again: Callable[[], Running], tmp_path: Path, rng: random.Random
) -> None:
    for _ in range(12):
        run = run_again()
        # From the launcher's first imports to some hundred steps; the interpreter's own start is nobody's.
        time.sleep(rng.uniform(0.7, 15.0))
        signs = read_signs(tmp_path / "run" / "ranks")
        started = [sign.pid for sign in signs if psutil.pid_exists(sign.pid)]
        target = rng.choice([run.process.pid, *started])
        where = [(sign.rank, sign.step, str(sign.phase)) for sign in signs]
        os.kill(target, signal.SIGTERM)
        status, out, err = run.end()
        said = f"{where}, {target} of {[run.process.pid, *started]}: {out}{err}"
        assert status == 0 and "Traceback" not in err and last_line(out).startswith("ended by SIGTERM"), said
