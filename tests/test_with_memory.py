"""Memory layers added to models that have none: what the engine would have drawn, or nothing at first."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ranks import checkpoint_with_memory, initial_parameters, logits_of, train_and_save, whole
from mempar.errors import ConfigError
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import WEIGHTS
from mempar.tools.convert import row_stream
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.with_memory import WithMemory
from rank_pool import RankPool
from toy import toy_run

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["memory.num_subkeys=11", "memory.heads=2", "memory.top_k=4", "memory.key_dim=16"]
MEMORY = [*SIZES, "memory.layers=[1,3]"]


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("saved")
    runs = {"dense": toy_run(kind="dense"), "bf16": toy_run(kind="dense", dtype="bf16"), "two": toy_run(kind="two")}
    runs["moe"] = toy_run(kind="moe")
    jobs = {name: pool.submit(1, train_and_save, run, root / name) for name, run in runs.items()}
    return {"root": root, **{name: job.result()[0] for name, job in jobs.items()}}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("variant", ["memory", "memory_plus", "peer"])
@pytest.mark.parametrize("source", ["dense", "bf16"])
def test_added_values_are_those_that_the_engine_draws(
    source: str, variant: str, beside: bool, saved: dict[str, Any], pool: RankPool
) -> None:
    more = [f"memory.variant={variant}", f"memory.beside={str(beside).lower()}", "memory.qk_norm=true"]
    found = WithMemory(CheckpointSource(saved["root"] / source), [*MEMORY, "memory.scalar_gate=true", *more])
    (drawn,) = pool.run(1, initial_parameters, found.run)
    assert drawn.keys() == found.tensors.keys()
    kept = found.source.tensors
    silent = {"memory_plus": (".output_proj.weight", ".output_proj.bias")}.get(variant, ("memory.values",))
    fresh = [name for name in found.tensors if name not in kept]
    assert len(fresh) > 10
    for name in fresh:
        assert tuple(drawn[name].shape) == found.tensors[name].shape
        expected = 0 * drawn[name] if beside and name.endswith(silent) else drawn[name]
        np.testing.assert_array_equal(whole(found, name).float().numpy(), expected, err_msg=name)
    network = {f"decoder.layers.{block}.mlp.linear_fc{part}.weight" for block in (1, 3) for part in (1, 2)}
    weights = {name for name, record in kept.items() if record.kind == WEIGHTS}
    assert weights - found.tensors.keys() == (set() if beside else network)
    assert {record.kind for record in found.tensors.values()} == {WEIGHTS}


def test_memory_beside_leaves_the_logits_of_a_checkpoint_as_they_were(saved: dict[str, Any], pool: RankPool) -> None:
    ((_, logits),) = pool.run(
        1, logits_of, checkpoint_with_memory, saved["root"] / "dense", [*MEMORY, "memory.beside=true"]
    )
    np.testing.assert_array_equal(logits[0], saved["dense"][1][0])


def test_streams_are_what_is_read(saved: dict[str, Any]) -> None:
    found = WithMemory(CheckpointSource(saved["root"] / "dense"), [*MEMORY, "memory.value_dim=20"])
    values = whole(found, "memory.values")
    assert found.cuts("memory.values") == [0, 121]
    with found.stream("memory.values", 17, 90) as rows:
        parts = [torch.empty(size, 20) for size in (1, 30, 42)]
        for part in parts:
            rows.read(part)
    assert torch.equal(torch.cat(parts), values[17:90])
    columns = torch.empty(5, 3)
    found.read(Box(name="memory.values", dtype="float32", shape=(121, 20), offset=(4, 7), sizes=(5, 3)), columns)
    assert torch.equal(columns, values[4:9, 7:10])
    weight = torch.empty(2, 24)
    with row_stream.box_rows(found, "decoder.layers.0.mlp.linear_fc1.weight", 5) as rows:
        rows.read(weight)
    assert torch.equal(weight, whole(found, "decoder.layers.0.mlp.linear_fc1.weight")[5:7])
    assert found.memory_bytes("memory.values") < 1 << 28
    assert found.memory_bytes("decoder.layers.1.mlp.keys") == 8 * 2 * 2 * 11 * 8


def test_identity_tells_what_is_added(saved: dict[str, Any]) -> None:
    source = CheckpointSource(saved["root"] / "dense")
    both = [WithMemory(source, MEMORY).identity for _ in range(2)]
    assert both[0] == both[1] != WithMemory(source, [*MEMORY, "memory.beside=true"]).identity
    assert both[0] != source.identity


REFUSED = {
    "has-memory": ("two", MEMORY, r"has memory layers in blocks \[1, 2, 3\]"),
    "other-section": ("dense", [*MEMORY, "model.num_layers=3"], "'model.num_layers=3' is no setting of a memory"),
    "unknown": ("dense", [*MEMORY, "memory.subkeys=3"], "'memory.subkeys' is not a setting"),
    "no-layers": ("dense", SIZES, "memory.layers is empty"),
    "outside": ("dense", [*SIZES, "memory.layers=[4]"], "leaves the model's blocks 0 to 3"),
    "disabled": ("dense", [*MEMORY, "memory.enabled=false"], "would add no memory layer"),
    "width": ("dense", [*MEMORY, "memory.variant=peer", "memory.value_dim=7"], "memory.value_dim=7 differs"),
    "in-place-of-experts": ("moe", MEMORY, r"moe.layers names the blocks \[1, 3\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_added_is_refused(name: str, saved: dict[str, Any]) -> None:
    source, assignments, expected = REFUSED[name]
    with pytest.raises(ConfigError, match=expected):
        WithMemory(CheckpointSource(saved["root"] / source), assignments)


def test_block_of_experts_has_no_network_to_stand_beside(saved: dict[str, Any]) -> None:
    source = CheckpointSource(saved["root"] / "moe")
    del source.tensors["decoder.layers.0.mlp.linear_fc1.weight"]
    with pytest.raises(ConfigError, match=r"block 0 of .* has no feed-forward network, but experts"):
        WithMemory(source, [*SIZES, "memory.layers=[0]", "memory.beside=true"])


def test_conversions_need_neither_megatron_nor_triton_nor_transformers(saved: dict[str, Any]) -> None:
    code = f"""
import sys
from pathlib import Path
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.hf import from_hf, to_hf
from mempar.tools.convert.with_memory import WithMemory
source = WithMemory(CheckpointSource(Path({str(saved["root"] / "dense")!r})), {MEMORY!r})
to_hf.plan_hf(source, memory_bytes=1 << 20)
sys.exit(", ".join({{"megatron", "triton", "transformers"}} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_where_nothing_is_asked(saved: dict[str, Any]) -> None:
    before = sorted(Path(saved["root"]).rglob("*"))
    WithMemory(CheckpointSource(saved["root"] / "dense"), MEMORY)
    assert sorted(Path(saved["root"]).rglob("*")) == before
