"""Tiny twins: the structure of their recipes, and steps of every one that differs from the others."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from mempar.memory.config import MemoryConfig
from mempar.recipes import RECIPES, TWINS, find_recipe
from mempar.recipes.tiny import MAX_RANKS, tiny
from mempar.runtime.config import ModelConfig, MoeConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.preflight import check_layout
from rank_pool import RankPool
from toy import joined, train

STEPS = 2


def distinct() -> dict[str, RunConfig]:
    """Twins by the first of the names whose runs are the same otherwise."""
    found: dict[RunConfig, str] = {}
    for name in TWINS:
        found.setdefault(replace(find_recipe(name), name="same"), name)
    return {name: find_recipe(name) for name in found.values()}


@pytest.mark.parametrize("name", RECIPES)
def test_twin_has_the_structure_of_its_recipe(name: str) -> None:
    run, twin = find_recipe(name), find_recipe(f"{name}_tiny")
    for ours, theirs in zip(twin.memories.values(), run.memories.values(), strict=True):
        assert len(ours.layers) == len(theirs.layers)
        for block, original in zip(ours.layers, theirs.layers, strict=True):
            assert abs(block / twin.model.num_layers - original / run.model.num_layers) < 0.1
        kept = {
            "variant",
            "optimizer",
            "rounding",
            "moments_dtype",
            "dtype",
            "score_dtype",
            "clip",
            "enabled",
            "qk_norm",
        }
        assert all(getattr(ours, each) == getattr(theirs, each) for each in kept)
        assert bool(ours.deposit_bytes) == bool(theirs.deposit_bytes)
    assert (twin.moe.num_experts, twin.moe.top_k, twin.moe.aux_loss) == (
        run.moe.num_experts, run.moe.top_k, run.moe.aux_loss,
    )  # fmt: skip
    assert (twin.train.dtype, twin.optim.schedule) == (run.train.dtype, run.optim.schedule)
    assert (twin.checkpoint, twin.parallel.distributed_optimizer) == (
        run.checkpoint,
        run.parallel.distributed_optimizer,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_twin_keeps_every_dimension_on_four_ranks(name: str) -> None:
    run, twin = find_recipe(name), find_recipe(f"{name}_tiny")
    ranks = twin.parallel.smallest_world
    assert ranks <= MAX_RANKS and twin.num_gpus == ranks and not twin.hardware.gpu
    check_layout(twin, ranks)
    check_layout(twin, MAX_RANKS)
    for dimension in ("tp", "pp", "ep", "mp", "mp_rows", "mp_hops"):
        assert (getattr(twin.parallel, dimension) > 1) == (getattr(run.parallel, dimension) > 1), dimension
    if run.parallel.mp_rows:
        assert (twin.parallel.mp > twin.parallel.mp_rows) == (run.parallel.mp > run.parallel.mp_rows)
    assert twin.parallel.sequence_parallel == run.parallel.sequence_parallel


def test_larger_tables_stay_larger() -> None:
    names = [f"1.3b_memory_plus_{slots}_64x{gpu}_bf16_tiny" for slots, gpu in zip(
        ("1m", "4m", "16m", "64m"), ("h100", "h100", "h100", "h200"), strict=True
    )]  # fmt: skip
    assert [find_recipe(name).memory.num_subkeys for name in names] == [16, 32, 64, 128]


AWKWARD: dict[str, dict[str, Any]] = {
    "pipeline of virtual stages": {"parallel": ParallelConfig(pp=4, vpp=2, mp=16, mp_rows=4, mp_hops=2)},
    "three dimensions": {
        "parallel": ParallelConfig(tp=4, pp=2, ep=4, mp=8, sequence_parallel=True),
        "moe": MoeConfig(num_experts=8, layers=(1, 2, 30), ffn_hidden_size=64),
    },
    "context parallelism": {"parallel": ParallelConfig(cp=2, mp=3)},
    "neighbouring layers": {
        "memory": MemoryConfig(layers=(3, 4, 5, 6)), "more_memories": (MemoryConfig(layers=(7,), variant="peer"),)
    },
    "a value of its own width": {"memory": MemoryConfig(layers=(3,), value_dim=64)},
    "patience": {"train": TrainConfig(spike_factor=2.0, spike_action="rollback", spike_skips=50, save_interval=100)},
}  # fmt: skip


@pytest.mark.parametrize("settings", AWKWARD.values(), ids=AWKWARD)
def test_any_run_shrinks(settings: dict[str, Any]) -> None:
    given = {"memory": MemoryConfig(layers=(8, 16, 24)), **settings}
    run = RunConfig(name="mine", model=ModelConfig(num_layers=32, num_attention_heads=12, num_query_groups=4), **given)
    twin = tiny(run)
    assert twin.name == "mine_tiny" and twin.parallel.smallest_world <= MAX_RANKS
    check_layout(twin, twin.parallel.smallest_world)
    for each in fields(ParallelConfig):
        if each.name in ("tp", "pp", "mp"):
            assert (getattr(twin.parallel, each.name) > 1) == (getattr(run.parallel, each.name) > 1)


@pytest.mark.parametrize("name", distinct())
def test_twin_trains(pool: RankPool, name: str) -> None:
    """Every rank reports the same finite numbers, and copies stay equal bit for bit (`joined` compares them)."""
    run = find_recipe(name)
    history = joined(run, pool.run(max(2, run.parallel.smallest_world), train, run, STEPS))
    assert len(history.reports) == STEPS
    for report in history.reports:
        assert report.applied and np.isfinite(report.loss) and report.grad_norm > 0
        assert (report.memory_grad_norm > 0) == run.memory.enabled
