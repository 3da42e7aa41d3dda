"""On a GPU: a run that is resumed is the uninterrupted one, and both backends train alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mempar.runtime import bringup
from rank_pool import RankPool
from toy import Session, toy_run

pytestmark = pytest.mark.gpu
STEPS = 8


def mempar(*arguments: str) -> None:
    # Not by its name, which need not be on the path.
    subprocess.run([sys.executable, "-c", "from mempar.cli import main; main()", *arguments], check=True)


def train(out: Path, *arguments: str) -> list[dict[str, float]]:
    mempar("train", "smoke", "--out", str(out), *arguments)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", f"train.steps={STEPS}", f"train.save_interval={STEPS // 2}")
    train(tmp_path / "parts", f"train.steps={STEPS // 2}", f"train.save_interval={STEPS // 2}")
    parts = train(tmp_path / "parts", f"train.steps={STEPS}", f"train.save_interval={STEPS // 2}", "--resume")
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in parts[STEPS // 2 :]] == [row[name] for row in whole[STEPS // 2 :]]
    saved = [tmp_path / name / "checkpoints" / f"step_{STEPS:08d}" for name in ("whole", "parts")]
    mempar("verify", *map(str, saved))


def test_both_backends_train_alike_in_float64(tmp_path: Path) -> None:
    runs = {
        name: train(tmp_path / name, f"train.steps={STEPS}", "train.dtype=float64", f"kernels.backend={name}")
        for name in ("torch", "triton")
    }
    for ours, theirs in zip(runs["triton"], runs["torch"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)


def test_bf16_with_a_stochastically_rounded_table_learns(tmp_path: Path) -> None:
    rows = train(
        tmp_path, "train.steps=30", "train.dtype=bf16", "memory.rounding=stochastic", "memory.optimizer=row_adagrad"
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def device_of_a_run() -> str:
    session = Session(toy_run())
    device = session.world.device.type, session.world.backend.name, session.model.tables[0].shard.values.device.type
    bringup.tear_down(session.world)
    return " ".join(device)


def test_the_laws_compute_on_the_gpu(pool: RankPool) -> None:
    # The ranks of the oracle law are started like this.
    assert pool.run(1, device_of_a_run) == ["cuda triton cuda"]
