"""Whole runs through the trainer: resuming, run directories, held-out loss (laws 5 and 7)."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mempar.errors import CheckpointError, ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime import bringup
from mempar.runtime.checkpoint.accept import open_checkpoint
from mempar.runtime.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from mempar.runtime.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.data.trigram import trigram_loss
from mempar.runtime.heldout import Heldout
from mempar.runtime.mcore import IndexedDatasetBuilder
from mempar.runtime.metrics import read_rows
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir, open_existing, open_new
from mempar.runtime.train import Trainer
from mempar.tools.convert.hf import kept_settings
from rank_pool import RankPool

LAYOUTS: dict[str, dict[str, int | bool]] = {
    "single": {},
    "tp2-mp4-rows": {"tp": 2, "mp": 4, "mp_rows": 4},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2-mp2-columns": {"pp": 2, "mp": 2, "mp_rows": 1},
    "mp3-rows": {"mp": 3, "mp_rows": 3},
    "mp4-grid": {"mp": 4, "mp_rows": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
}


def toy(
    paths: tuple[str, ...],
    *,
    dtype: str = "float64",
    optimizer: str = "row_adam",
    memory: dict[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    return RunConfig(
        name="toy",
        model=ModelConfig(
            num_layers=4,
            hidden_size=24,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=32,
            vocab_multiple=8,
        ),
        memory=MemoryConfig(
            layers=(1, 2, 3),
            num_subkeys=9,
            heads=2,
            top_k=3,
            key_dim=8,
            column_tile=8,
            optimizer=optimizer,
            # A window spans the step at which runs are saved and resumed.
            usage_interval=4,
            **(memory or {}),
        ),
        parallel=ParallelConfig(**parallel),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, schedule="constant"),
        train=TrainConfig(
            steps=5,
            global_batch_size=12,
            micro_batch_size=2,
            seq_length=12,
            dtype=dtype,
            save_interval=3,
            heldout_samples=12,
            log_interval=100,
        ),
        data=DataConfig(paths=paths, heldout_paths=paths),
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A small data set of bytes."""
    prefix = str(tmp_path_factory.mktemp("data") / "bytes")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    numbers = np.random.default_rng(5)
    for _ in range(12):
        builder.add_item(torch.from_numpy(numbers.integers(0, 64, 90)))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return (prefix,)


def run_on_rank(directory: str, load: str | None) -> None:
    """Train the run that lies in a directory, on this rank of the pool."""
    paths = RunDir(Path(directory))
    run = load_yaml(paths.config)
    world = bringup.lay_out(run)
    Trainer(run, world, paths, Path(load) if load else None).train()
    bringup.tear_down(world)


def train(pool: RankPool, run: RunConfig, root: Path, *, ranks: int | None = None, resume: bool = False) -> list[dict]:
    """Train as the command line would; returns the rows of metrics.jsonl that have a loss."""
    directory = open_existing(root, run) if resume else open_new(root, run)
    load = directory.latest_checkpoint() if resume else None
    pool.run(ranks or run.parallel.smallest_world, run_on_rank, str(root), str(load) if load else None)
    return [row for row in read_rows(directory.metrics) if "loss" in row]


@pytest.fixture(scope="module")
def single_runs(
    pool: RankPool, paths: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict]]:
    """The uninterrupted run of a single process with a table optimizer, trained once."""

    @functools.cache
    def rows(optimizer: str) -> list[dict]:
        return train(pool, toy(paths, optimizer=optimizer), tmp_path_factory.mktemp("single") / optimizer)

    return rows


# Beginnings of the names of usage figures.
USAGE = ("memory_coverage", "memory_dead", "memory_reads", "memory_busiest", "memory_effective", "memory_shard")
USAGE += ("memory_entropy",)


def usage_of(rows: list[dict]) -> dict[str, float]:
    """The last report of usage."""
    reports = [{name: row[name] for name in row if name.startswith(USAGE)} for row in rows]
    return [report for report in reports if report][-1]


def until(run: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))


@pytest.mark.parametrize(
    ("layout", "dtype", "optimizer", "memory", "ranks"),
    [
        ({}, "float32", "row_adam", {"moments_dtype": "bf16", "dtype": "bf16", "rounding": "stochastic"}, 1),
        ({}, "bf16", "adamw", {}, 2),
        ({"tp": 2, "mp": 4, "mp_rows": 4}, "float32", "row_adam", {}, 4),
        ({"distributed_optimizer": True, "mp": 2, "mp_rows": 1}, "float32", "adamw", {}, 2),
        ({"distributed_optimizer": True, "tp": 2}, "bf16", "row_adam", {}, 4),
        ({"pp": 2, "vpp": 2}, "float32", "row_adagrad", {"schedule": "linear", "clip": "joint"}, 2),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else str(value),
)
def test_resume_in_the_same_layout_is_bit_for_bit_the_uninterrupted_run(
    pool: RankPool,
    paths: tuple[str, ...],
    tmp_path: Path,
    layout: dict[str, Any],
    dtype: str,
    optimizer: str,
    memory: dict[str, Any],
    ranks: int,
) -> None:
    run = toy(paths, dtype=dtype, optimizer=optimizer, memory=memory, **layout)
    whole = train(pool, run, tmp_path / "whole", ranks=ranks)
    train(pool, until(run, 3), tmp_path / "parts", ranks=ranks)
    parts = train(pool, run, tmp_path / "parts", ranks=ranks, resume=True)
    assert [row["step"] for row in parts] == [1, 2, 3, 4, 5]
    for before, after in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", "memory_grad_norm", "lr", "tokens"):
            assert before[name] == after[name], f"{name} of step {before['step']}"
    assert usage_of(parts) == usage_of(whole)


@pytest.mark.parametrize(
    ("saved_in", "resumed_in"),
    [
        ("single", "tp2-mp4-rows"),
        ("tp2-mp4-rows", "pp2-mp2-columns"),
        ("pp2-mp2-columns", "mp3-rows"),
        ("mp3-rows", "mp4-grid"),
        ("mp4-grid", "pp2-vpp2"),
        ("pp2-vpp2", "tp2-sp"),
        ("tp2-sp", "single"),
    ],
)
def test_resume_in_another_layout_keeps_the_layout_law(
    pool: RankPool,
    paths: tuple[str, ...],
    single_runs: Callable[[str], list[dict]],
    tmp_path: Path,
    saved_in: str,
    resumed_in: str,
) -> None:
    optimizer = {"mp3-rows": "adamw", "tp2-mp4-rows": "row_adagrad", "pp2-mp2-columns": "row_adagrad"}.get(
        saved_in, "row_adam"
    )
    whole = single_runs(optimizer)
    train(pool, until(toy(paths, optimizer=optimizer, **LAYOUTS[saved_in]), 3), tmp_path / "parts")
    parts = train(pool, toy(paths, optimizer=optimizer, **LAYOUTS[resumed_in]), tmp_path / "parts", resume=True)
    for before, after in zip(whole, parts, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-9)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-6)
        assert after["memory_grad_norm"] == pytest.approx(before["memory_grad_norm"], rel=1e-6)
    expected, found = usage_of(whole), usage_of(parts)
    # How evenly shards are read is the one figure that depends on them.
    assert expected.pop("memory_shard_imbalance") == 1.0 <= found.pop("memory_shard_imbalance")
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected["memory_dead_since_step"] == 0


def test_usage_counts_from_the_resumed_step_when_the_checkpoint_did_not(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = toy(paths)
    silent = dataclasses.replace(run, memory=dataclasses.replace(run.memory, usage_interval=0))
    rows = train(pool, until(silent, 3), tmp_path / "run")
    assert not any(name.startswith(USAGE) for row in rows for name in row)
    layout = json.loads((tmp_path / "run" / "layout.json").read_text())
    assert layout["ranks"][0]["history_bytes"] == {}
    resumed = usage_of(train(pool, run, tmp_path / "run", resume=True))
    assert (resumed["memory_dead_since_step"], resumed["memory_coverage_steps"]) == (3, 1)
    assert resumed["memory_dead_slots"] == round(81 * (1.0 - resumed["memory_coverage"]))
    # Saved again, the history goes on from there.
    longer = dataclasses.replace(until(run, 8), memory=dataclasses.replace(run.memory, usage_interval=8))
    later = usage_of(train(pool, longer, tmp_path / "run", resume=True))
    assert (later["memory_dead_since_step"], later["memory_coverage_steps"]) == (3, 5)
    assert later["memory_dead_slots"] <= resumed["memory_dead_slots"]


def test_resume_of_the_distributed_optimizer_on_other_ranks_keeps_the_layout_law(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    run = toy(paths, dtype="float32", distributed_optimizer=True)
    whole = train(pool, run, tmp_path / "whole", ranks=2)
    train(pool, until(run, 3), tmp_path / "parts", ranks=2)
    resumed = toy(paths, dtype="float32", distributed_optimizer=True, tp=2)
    parts = train(pool, resumed, tmp_path / "parts", ranks=4, resume=True)
    # One step from a common state: the float32 form of the law.
    assert parts[3]["loss"] == pytest.approx(whole[3]["loss"], rel=1e-6)
    assert parts[3]["grad_norm"] == pytest.approx(whole[3]["grad_norm"], rel=1e-5)


def test_run_directory_holds_what_design_says(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = dataclasses.replace(
        toy(paths), train=dataclasses.replace(toy(paths).train, save_interval=1, keep_checkpoints=2)
    )
    train(pool, run, tmp_path / "run")
    directory = RunDir(tmp_path / "run")
    assert load_yaml(directory.config) == run
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step_00000004", "step_00000005"]
    rows = read_rows(directory.metrics)
    needed = {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_s"}
    assert all(needed <= row.keys() for row in rows if "loss" in row)
    assert any(path.name.startswith("events.out.tfevents") for path in directory.root.iterdir())
    heldout = [row for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in heldout] == [0, 5]
    assert heldout[1]["heldout_loss"] < heldout[0]["heldout_loss"]
    assert heldout[1]["heldout_loss_memory_off"] != heldout[1]["heldout_loss"]
    assert "loss" not in heldout[0]


def test_heldout_trigram_is_counted_on_the_very_windows(paths: tuple[str, ...]) -> None:
    run = toy(paths)
    heldout = Heldout(run, None, None, None)  # type: ignore[arg-type]
    windows = np.stack([heldout.samples[index] for index in range(run.train.heldout_samples)])
    assert windows.shape == (12, 13)
    train_tokens = np.fromfile(paths[0] + ".bin", dtype=np.uint16)
    assert heldout.trigram_loss == trigram_loss(train_tokens, windows, 257)
    assert 1.0 < heldout.trigram_loss < np.log(257)


def test_metrics_are_cut_back_to_the_resumed_step(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = toy(paths)
    train(pool, until(run, 3), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        # A run that went on for two steps after its last checkpoint, and died while writing.
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    rows = train(pool, run, tmp_path / "run", resume=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3]["loss"] > 2.0


def test_resume_of_a_finished_run_changes_nothing(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = until(toy(paths), 2)
    before = train(pool, run, tmp_path / "run")
    assert train(pool, run, tmp_path / "run", resume=True) == before


def test_where_weights_came_from_is_passed_on(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = toy(paths)
    train(pool, until(run, 1), tmp_path / "run")
    first = RunDir(tmp_path / "run").checkpoint(1)
    manifest = read_manifest(first)
    manifest.about[kept_settings.KEY] = {"eos_token_id": [3]}
    (first / MANIFEST).write_bytes(write_manifest(manifest))
    train(pool, until(run, 2), tmp_path / "run", resume=True)
    assert read_manifest(RunDir(tmp_path / "run").checkpoint(2)).about[kept_settings.KEY] == {"eos_token_id": [3]}


def test_other_runs_and_other_models_are_refused(pool: RankPool, paths: tuple[str, ...], tmp_path: Path) -> None:
    run = until(toy(paths), 1)
    train(pool, run, tmp_path / "run")
    saved = RunDir(tmp_path / "run").latest_checkpoint()
    assert saved is not None
    with pytest.raises(ConfigError, match="holds a run already"):
        open_new(tmp_path / "run", run)
    reseeded = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=2))
    with pytest.raises(ConfigError, match=r"another run: train.seed is 1 there and 2 here"):
        open_existing(tmp_path / "run", reseeded)
    # How reads travel is no part of what the run is.
    merging = dataclasses.replace(run, memory=dataclasses.replace(run.memory, merge_duplicates="on"))
    assert open_existing(tmp_path / "run", merging).root == tmp_path / "run"
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, ffn_hidden_size=64))
    with pytest.raises(CheckpointError, match=r"model.ffn_hidden_size is 32 there and 64 here"):
        open_checkpoint(saved, wider)
    for optimizer, memory, said in (
        ("row_adagrad", {}, "memory.optimizer is adamw or row_adam there and row_adagrad here"),
        (
            "row_adam",
            {"dtype": "bf16", "moments_dtype": "bf16"},
            "memory.dtype is float64 there and bf16 here; memory.moments_dtype is float32 there and bf16 here",
        ),
        ("row_adam", {"dtype": "bf16"}, "memory.dtype is float64 there and bf16 here"),
    ):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(saved, toy(paths, optimizer=optimizer, memory=memory))
    # They keep the same moments.
    assert open_checkpoint(saved, toy(paths, optimizer="adamw")).step == 1
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        open_checkpoint(tmp_path, run)


def spoil_and_step(yaml: str) -> list[Any]:
    """Train a step whose gradient is not finite on one rank; returns what changed and what was reported."""
    run = load_yaml(Path(yaml))
    world = bringup.lay_out(run)
    trainer = Trainer(run, world, RunDir(Path(yaml).parent), None)
    shard = trainer.model.tables[0].shard
    before = shard.values.clone()
    if world.rank == 1:
        take = shard.take_gradient
        shard.take_gradient = lambda: (lambda rows, grad: (rows, grad * float("nan")))(*take())  # type: ignore[method-assign]
    trainer._step()
    unchanged = torch.equal(before, shard.values)
    bringup.tear_down(world)
    return [unchanged, trainer.progress.skipped, trainer.progress.step]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    pool: RankPool, paths: tuple[str, ...], tmp_path: Path
) -> None:
    directory = open_new(tmp_path / "run", toy(paths, mp=2))
    assert pool.run(2, spoil_and_step, str(directory.config)) == [[True, 1, 1], [True, 1, 1]]
