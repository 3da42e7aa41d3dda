"""Runs that spike and go back, end, or only report; resuming them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mempar.runtime import bringup
from mempar.runtime.checkpoint.manifest import read_manifest, write_manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.metrics import MetricsLog, read_rows
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir, open_existing, open_new
from mempar.runtime.train import Trainer
from rank_pool import RankFailure, RankPool
from test_train import paths, toy

__all__ = ["paths"]

# Samples whose losses are spoiled, by default those of step 8.
Fault = tuple[range, float]
STEP_8: Fault = (range(84, 96), 3.0)


def spiking(run: RunConfig, **settings: Any) -> RunConfig:
    settings = {"steps": 11, "spike_factor": 2.0, "spike_window": 4, "spike_action": "rollback", **settings}
    return replace(run, train=replace(run.train, heldout_samples=0, **settings))


def train_spoiled(directory: str, load: str | None, fault: Fault) -> None:
    """Train the run that lies in a directory; losses of some samples are multiplied."""
    paths = RunDir(Path(directory))
    run = load_yaml(paths.config)
    world = bringup.lay_out(run)
    trainer = Trainer(run, world, paths, Path(load) if load else None)
    forward = trainer.stepper._forward

    def spoiled(cursor: Any, chunk: Any) -> tuple[Tensor, Any]:
        output, loss = forward(cursor, chunk)
        batch = trainer.model.in_flight.current
        assert batch is not None
        factor = fault[1] if batch.sample_ids[0] in fault[0] else 1.0
        return output, lambda losses: loss(losses * factor)

    trainer.stepper._forward = spoiled  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        bringup.tear_down(world)


def train(
    pool: RankPool, run: RunConfig, root: Path, *, ranks: int, fault: Fault = STEP_8, resume: bool = False
) -> list[dict[str, Any]]:
    directory = open_existing(root, run) if resume else open_new(root, run)
    load = str(directory.latest_checkpoint()) if resume else None
    pool.run(ranks, train_spoiled, str(root), load, fault)
    return read_rows(directory.metrics)


def numbers(rows: list[dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    names = ("loss", "grad_norm", "memory_grad_norm", "lr", "tokens")
    return {row["step"]: tuple(row[name] for name in names) for row in rows if "loss" in row}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"dtype": "bf16", "mp": 2, "mp_rows": 2}),
        (2, {"dtype": "float32", "distributed_optimizer": True, "optimizer": "adamw"}),
        (2, {"dtype": "float32", "pp": 2}),
    ],
    ids=["bf16-rows", "distributed-optimizer", "stage-copies"],
)
def test_rollback_is_the_run_that_never_saw_the_spike(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path, ranks: int, settings: dict[str, Any]
) -> None:
    run = spiking(toy(paths, **settings), keep_checkpoints=4)
    rows = train(pool, run, tmp_path / "run", ranks=ranks)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 12))
    (event,) = [row for row in rows if "event" in row]
    told = {name: event[name] for name in ("step", "event", "spike_step", "spike_began", "rollbacks", "next_sample")}
    assert told == {
        "step": 6, "event": "rollback", "spike_step": 8, "spike_began": 8, "rollbacks": 1, "next_sample": 96
    }  # fmt: skip
    assert event["spike_loss"] > 2.0 * event["median_loss"]
    assert any(phrase.startswith("memory.values: rows ") for phrase in event["diverged"])
    assert rows.index(event) == 6
    directory = RunDir(tmp_path / "run")
    assert [path.name[-2:] for path in sorted(directory.checkpoints.iterdir())] == ["03", "06", "09", "11"]
    last = read_manifest(directory.checkpoint(11)).progress
    assert (last["samples"], last["rollbacks"], last["applied_steps"]) == (96 + 5 * 12, 1, 11)
    # The same from the checkpoint, by a run that was told where to go on.
    other = open_new(tmp_path / "other", run)
    shutil.copytree(directory.checkpoint(6), other.checkpoint(6))
    manifest = read_manifest(other.checkpoint(6))
    assert manifest.progress["samples"] == 72
    manifest.progress["samples"] = 96
    (other.checkpoint(6) / "manifest.json").write_bytes(write_manifest(manifest))
    expected = numbers(train(pool, run, tmp_path / "other", ranks=ranks, resume=True))
    assert {step: numbers(rows)[step] for step in range(7, 12)} == expected


def test_position_after_a_rollback_is_exact_in_another_layout_and_replays_from_before_it(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = spiking(toy(paths), keep_checkpoints=4)
    whole = train(pool, run, tmp_path / "whole", ranks=1)
    # From after the rollback, on three data-parallel ranks.
    shutil.copytree(tmp_path / "whole", tmp_path / "after")
    shutil.rmtree(RunDir(tmp_path / "after").checkpoint(11))
    after = train(pool, spiking(toy(paths, mp=3), keep_checkpoints=4), tmp_path / "after", ranks=3, resume=True)
    # From before it: the same spike, the same rollback, told once.
    shutil.copytree(tmp_path / "whole", tmp_path / "before")
    for step in (9, 11):
        shutil.rmtree(RunDir(tmp_path / "before").checkpoint(step))
    before = train(pool, run, tmp_path / "before", ranks=1, resume=True)
    assert numbers(before) == numbers(whole)
    assert [row for row in before if "event" in row] == [row for row in whole if "event" in row]
    assert [row for row in after if "event" in row] == [row for row in whole if "event" in row]
    for step, found in numbers(after).items():
        assert found == pytest.approx(numbers(whole)[step], rel=1e-6 if step > 9 else 0)


def test_run_of_skipped_steps_goes_back_before_it_and_ends_after_too_many(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    # The first steps are not finite: back to the checkpoint that was written for this before any step.
    run = spiking(toy(paths), steps=3, spike_skips=2, spike_max_rollbacks=2, save_interval=1, keep_checkpoints=3)
    rows = train(pool, run, tmp_path / "twice", ranks=1, fault=(range(48), float("nan")))
    events = [row for row in rows if "event" in row]
    assert [(row["step"], row["rollbacks"], row["next_sample"]) for row in events] == [(0, 1, 24), (0, 2, 48)]
    assert all(row["skipped_in_a_row"] == 2 and row["median_loss"] is None for row in events)
    assert all(row["spike_loss"] is None for row in events)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert read_manifest(RunDir(tmp_path / "twice").checkpoint(3)).progress["samples"] == 48 + 36
    with pytest.raises(
        RankFailure, match=r"MemparError: step 2 is the last of 2 skipped.* after 2 rollbacks; .*=2 times"
    ):
        train(pool, run, tmp_path / "thrice", ranks=1, fault=(range(72), float("nan")))
    last = read_rows(RunDir(tmp_path / "thrice").metrics)
    assert [row.get("event") for row in last] == ["rollback", "rollback", None, None, "spike"]


def test_rollback_keeps_later_checkpoints_when_the_good_one_cannot_be_read(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    # The first two steps are not finite: step 1 is saved, and step 2 goes back to before it.
    run = spiking(toy(paths, mp=2), steps=3, spike_skips=2, save_interval=1, keep_checkpoints=3)
    fault = (range(24), float("nan"))
    train(pool, replace(run, train=replace(run.train, steps=1)), tmp_path / "run", ranks=2, fault=fault)
    directory = RunDir(tmp_path / "run")
    # Only rank 1 reads what is damaged; what rank 0 has read must not let it delete the others.
    damaged = max((directory.checkpoint(0) / "tables" / "memory.values").iterdir())
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    later = {path: path.read_bytes() for path in directory.checkpoint(1).rglob("*") if path.is_file()}
    with pytest.raises(RankFailure, match=rf"in roll_back\n(?s:.*){damaged.name} is damaged"):
        train(pool, run, tmp_path / "run", ranks=2, fault=fault, resume=True)
    assert {path: path.read_bytes() for path in directory.checkpoint(1).rglob("*") if path.is_file()} == later
    assert directory.latest_checkpoint() == directory.checkpoint(1)


def test_report_goes_on_and_skipped_steps_are_counted_and_named(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = spiking(toy(paths, mp=2), steps=9, spike_action="report")
    whole = train(pool, run, tmp_path / "whole", ranks=2)
    events = [row for row in whole if "event" in row]
    assert [(row["step"], row["event"], row["spike_step"]) for row in events] == [(8, "spike", 8)]
    assert len(numbers(whole)) == 9
    # A step that is skipped between two checkpoints, and a resume after it.
    fault = (range(48, 60), float("inf"))
    rows = train(pool, replace(run, train=replace(run.train, steps=6)), tmp_path / "parts", ranks=2, fault=fault)
    rows = train(pool, run, tmp_path / "parts", ranks=2, fault=fault, resume=True)
    assert [row.get("skipped_steps") for row in rows] == [None] * 4 + [1] * 5
    assert rows[4]["loss"] is None
    assert len(rows[4]["not_finite"]) > 2
    assert all(row["loss"] is not None for row in rows if row["step"] != 5)
    meta = read_manifest(RunDir(tmp_path / "parts").checkpoint(9)).progress
    assert (meta["step"], meta["applied_steps"], meta["samples"]) == (9, 8, 108)


def test_log_cuts_steps_and_events_of_later_rollbacks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, first_step=0)
    log.write({"step": 1, "loss": 2.0})
    log.write({"step": 1, "event": "rollback", "rollbacks": 1})
    log.write({"step": 2, "loss": float("nan")})
    log.write({"step": 1, "event": "rollback", "rollbacks": 2})
    assert '"loss": null' in path.read_text()
    log.cut(1, 1)
    assert [row.get("rollbacks") for row in read_rows(path)] == [None, 1]
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 1, 2]
