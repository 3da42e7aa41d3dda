"""SIGKILL around saves: the newest whole checkpoint always loads, and the run goes on exactly (laws 5 and 7).

`make soak` kills fifty times and leaves what it saw in benchmarks/results/.
"""

import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.checkpoint.retention import checkpoints_in
from mempar.runtime.config import RunConfig
from mempar.runtime.metrics import read_rows
from mempar.runtime.overrides import to_yaml
from mempar.runtime.run_dir import RunDir
from mempar.tools import verify
from rank_pool import RankPool
from test_train import paths, toy, train

__all__ = ["paths"]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEMPAR = Path(sys.executable).with_name("mempar")
NUMBERS = ("step", "loss", "grad_norm", "memory_grad_norm", "tokens")
# A save of this run takes a few hundredths of a second.
LONGEST_DELAY_SECONDS = 0.08


def saving_always(paths: tuple[str, ...], steps: int) -> RunConfig:
    run = toy(paths, dtype="float32", mp=2, mp_rows=2)
    settings = {"steps": steps, "save_interval": 1, "keep_checkpoints": 3, "heldout_samples": 0}
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, **settings),
        memory=dataclasses.replace(run.memory, usage_interval=0),
        checkpoint=CheckpointConfig(block_bytes=500),
    )


def command(recipe: Path, root: Path, *more: str) -> list[str]:
    return [str(MEMPAR), "train", str(recipe), "--out", str(root), "--resume", *more]


def kill_around_a_save(recipe: Path, root: Path, draw: random.Random, number: int) -> None:
    """Start the run or go on with it, and kill all its processes at once while it saves, or just before or after."""
    before = {path.name for path in RunDir(root).checkpoints.glob("step_*")}
    asynchronous = f"checkpoint.asynchronous={'true' if number % 2 else 'false'}"
    process = subprocess.Popen(
        command(recipe, root, asynchronous),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    new = draw.randrange(1, 4)
    delay = draw.uniform(0.0, LONGEST_DELAY_SECONDS)
    try:
        while len({path.name for path in RunDir(root).checkpoints.glob("step_*")} - before) < new:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill_again_and_again(pool: RankPool, paths: tuple[str, ...], root: Path, kills: int) -> dict[str, int]:
    """Kill a run and go on with it, and compare it in the end with one that was let alone; returns what was seen."""
    draw = random.Random()
    seed = draw.randrange(2**32)
    print(f"seed {seed}")
    draw.seed(seed)
    recipe, directory = root / "recipe.yaml", RunDir(root / "run")
    recipe.write_text(to_yaml(saving_always(paths, 10**6)))
    steps, unfinished = 0, 0
    for number in range(kills):
        kill_around_a_save(recipe, directory.root, draw, number)
        unfinished += any(directory.checkpoints.glob("*.partial"))
        latest = directory.latest_checkpoint()
        # What has the name of a checkpoint is one, and nothing is lost that was there before.
        for path in directory.checkpoints.glob("step_????????"):
            assert verify.examine(read_manifest(path), lambda count: None).damages == []
        # The first kill may come before the first checkpoint.
        assert latest is not None or not steps
        if latest is not None:
            assert read_manifest(latest).step >= steps
            steps = read_manifest(latest).step
    print(f"{unfinished} of {kills} kills left an unfinished checkpoint")
    finished = subprocess.run(
        command(recipe, directory.root, f"train.steps={steps + 2}"), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.suffix for path in directory.checkpoints.iterdir()] == [""] * len(
        checkpoints_in(directory.checkpoints)
    )
    found = [[row[name] for name in NUMBERS] for row in read_rows(directory.metrics) if "loss" in row]
    whole = train(pool, saving_always(paths, steps + 2), root / "whole")
    assert found == [[row[name] for name in NUMBERS] for row in whole]
    return {"seed": seed, "kills": kills, "left_unfinished": unfinished, "steps": steps + 2}


def test_killed_run_goes_on_exactly(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    kill_again_and_again(pool, paths, tmp_path, 2)


@pytest.mark.soak
def test_run_killed_fifty_times_goes_on_exactly(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    seen = kill_again_and_again(pool, paths, tmp_path, 50)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False)
    today = datetime.date.today().isoformat()
    report = {"date": today, "commit": commit.stdout.strip(), "cores": os.cpu_count(), **seen}
    (RESULTS / f"kill-soak-{today}.json").write_text(json.dumps(report, indent=1) + "\n")
