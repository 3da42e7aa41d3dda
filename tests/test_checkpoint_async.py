"""Checkpoints written beside training hold what those written at once do, and get their names soon."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mempar.runtime.bringup import lay_out, tear_down
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.checkpoint.saving import Save
from mempar.runtime.config import RunConfig
from mempar.runtime.metrics import read_rows
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir, open_new
from mempar.runtime.train import Trainer
from mempar.tools import verify
from rank_pool import RankPool
from test_train import paths, toy

__all__ = ["paths"]

LAYOUT = {"mp": 2, "mp_rows": 2}
NUMBERS = ("step", "loss", "grad_norm", "memory_grad_norm")


def saving_run(paths: tuple[str, ...], **checkpoint: bool) -> RunConfig:
    run = toy(paths, **LAYOUT)
    train = replace(run.train, steps=6, save_interval=2, keep_checkpoints=9, heldout_samples=0)
    return replace(run, train=train, checkpoint=CheckpointConfig(block_bytes=500, **checkpoint))


def train_slowly_written(root: str, slow_seconds: float, failing_step: int) -> list[tuple[int, str]]:
    """Train a run whose second rank writes slowly, or not; returns the step at which each checkpoint was there."""
    directory = RunDir(Path(root))
    run = load_yaml(directory.config)
    world = lay_out(run)
    trainer = Trainer(run, world, directory, None)
    there: list[tuple[int, str]] = []
    trainer.keeper.say = lambda text: there.append((trainer.progress.step, text.split()[1].rpartition("_")[2]))
    write = Save._write

    def slowly(save: Save, parts: object) -> None:
        if world.rank == 1:
            time.sleep(slow_seconds)
        if world.rank == 1 and save.path == directory.checkpoint(failing_step):
            save.written.error = "rank 1: the disk is gone"
            return
        write(save, parts)  # type: ignore[arg-type]

    Save._write = slowly  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        Save._write = write  # type: ignore[method-assign]
        tear_down(world)
    return there


def numbers(directory: RunDir) -> list[list[float]]:
    return [[row[name] for name in NUMBERS] for row in read_rows(directory.metrics) if "loss" in row]


def test_asynchronous_saves_hold_what_saves_at_once_hold(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    found = {}
    for name, slow_seconds in (("at-once", 0.0), ("beside", 0.0), ("slow", 0.3)):
        run = saving_run(paths, asynchronous=name != "at-once")
        directory = open_new(tmp_path / name, run)
        there, _ = pool.run(2, train_slowly_written, str(directory.root), slow_seconds, -1)
        found[name] = directory, there
    at_once, there = found.pop("at-once")
    assert there == [(2, "00000002"), (4, "00000004"), (6, "00000006")]
    for directory, there in found.values():
        assert numbers(directory) == numbers(at_once)
        # Named before the next one begins, and the last one before the run ends.
        assert [name for _, name in there] == ["00000002", "00000004", "00000006"]
        assert all(int(name) <= step <= min(6, int(name) + 2) for step, name in there)
        for step in (2, 4, 6):
            one, other = (read_manifest(each.checkpoint(step)) for each in (at_once, directory))
            assert one.tensors == other.tensors
            assert {path for path in one.files if "dense" not in path} == {p for p in other.files if "dense" not in p}
            # Steps are counted in there, by tensors that training changes.
            common = "dense/common.pt"
            assert one.files[common].pieces == other.files[common].pieces
            assert verify.examine(other, lambda count: None).damages == []
    # Training went on while they were written.
    assert any(step > int(name) for step, name in found["slow"][1])


def test_an_asynchronous_save_that_fails_ends_the_run_and_leaves_the_one_before(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    directory = open_new(tmp_path / "run", saving_run(paths, asynchronous=True))
    with pytest.raises(AssertionError, match=r"step_00000004 cannot be written: rank 1: the disk is gone"):
        pool.run(2, train_slowly_written, str(directory.root), 0.0, 4)
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step_00000002"]
