"""Predicted bytes of checkpoints against the bytes that lie on disk (mempar.runtime.checkpoint.size)."""

import math
from pathlib import Path
from typing import Any

import pytest

from mempar.recipes import find_recipe
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.checkpoint.size import checkpoint_size
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import vocab_size
from rank_pool import RankPool
from toy import VOCAB, Session, toy_run
from toy_checkpoints import save_checkpoint

# What torch, safetensors and the manifest put around a tensor, and the description of the run.
TENSOR_BYTES, OTHER_BYTES = 4096, 65536
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int32": 4}
WIDE = {"layers": (1, 3), "num_subkeys": 32, "column_tile": 16, "value_dim": 256}
CASES: dict[str, dict[str, Any]] = {
    "large": {"memory": {**WIDE, "num_subkeys": 64}},
    "row_adagrad, no history": {
        "memory": {**WIDE, "value_dim": 512, "usage_interval": 0}, "optimizer": "row_adagrad", "tied": True,
    },
    "bf16": {"memory": WIDE, "dtype": "bf16"},
    "float64, two tables": {"memory": {**WIDE, "value_dim": 0, "column_tile": 4}, "kind": "peer", "dtype": "float64"},
    "distributed optimizer": {"memory": {**WIDE, "num_subkeys": 8, "key_dim": 1024}, "distributed_optimizer": True},
    "bf16 table, stochastic": {
        "memory": {**WIDE, "value_dim": 512, "dtype": "bf16", "rounding": "stochastic", "moments_dtype": "bf16"},
    },
    "experts": {"kind": "moe", "experts": {"ffn_hidden_size": 512}},
}  # fmt: skip


def save(run: RunConfig, path: Path) -> None:
    session = Session(run)
    session.step(0)
    save_checkpoint(path, run, session, {"step": 1, "applied_steps": 1})
    tear_down(session.world)


@pytest.mark.parametrize("name", CASES)
def test_predicted_size_is_that_of_the_tensors_and_on_disk(pool: RankPool, tmp_path: Path, name: str) -> None:
    run, path = toy_run(**CASES[name]), tmp_path / "step_00000001"
    pool.run(1, save, run, path)
    tensors = read_manifest(path).tensors.values()
    predicted = checkpoint_size(run, VOCAB).total
    assert predicted == sum(math.prod(tensor.shape) * BYTES[tensor.dtype] for tensor in tensors)
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{name}: {predicted} predicted, {on_disk} on disk")
    assert predicted <= on_disk <= predicted + TENSOR_BYTES * len(tensors) + OTHER_BYTES
    if name == "large":
        assert on_disk <= 1.03 * predicted


def test_parts_of_the_smoke_recipe() -> None:
    run = find_recipe("smoke")
    size = checkpoint_size(run, vocab_size(run))
    # Values and two moments in float32; when each of the 128 x 128 rows was read last.
    assert size.tables == 3 * 4 * 128**2 * 256 and size.histories == 4 * 128**2
    assert size.total == size.dense + size.tables + size.histories
