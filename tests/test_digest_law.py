"""Law 6: what a checkpoint holds does not depend on the layout that wrote it; megatron reads its dense part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layout_cases import LAYOUTS, MOE_LAYOUTS
from mempar.runtime import mcore
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.dense import _sharded_state
from mempar.runtime.checkpoint.manifest import HISTORY, read_manifest
from mempar.runtime.config import RunConfig
from mempar.tools.verify import differences, examine
from rank_pool import RankPool
from shares import boxes_foreseen, boxes_written
from toy import Session, toy_run
from toy_checkpoints import load_into, save_checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "memory_plus-row_adam": {"ragged": True, "extras": True},
    "two-row_adagrad-bf16": {"kind": "two", "optimizer": "row_adagrad", "dtype": "bf16", "tied": True},
    "peer-adamw": {"kind": "peer", "optimizer": "adamw"},
    "beside-row_adam-bf16-moments": {
        "kind": "beside",
        "dtype": "bf16",
        "memory": {"moments_dtype": "bf16", "rounding": "stochastic"},
    },
}
PLAIN = [layout for layout in LAYOUTS if not layout.startswith("do")]
DISTRIBUTED = [layout for layout in LAYOUTS if layout.startswith("do")]
# Each model goes through every fourth layout, from one to the next, and on the way through the distributed
# optimizer and back; together they go through all of them.
CHAINS = {
    name: [*PLAIN[place::4][:3], DISTRIBUTED[place % len(DISTRIBUTED)], *PLAIN[place::4][3:]]
    for place, name in enumerate(MODELS)
}
PROGRESS = {"step": 2, "applied_steps": 2}


def small_blocks(run: RunConfig, **settings: Any) -> RunConfig:
    return replace(run, checkpoint=CheckpointConfig(block_bytes=700, **settings))


def train_and_save(run: RunConfig, target: Path) -> None:
    """Train two steps and save."""
    session = Session(run)
    session.optimizers.watching = False
    for step in range(2):
        session.step(step)
    save_checkpoint(target, run, session, PROGRESS)
    tear_down(session.world)


def load_and_save(run: RunConfig, source: Path, target: Path) -> None:
    """Load in this layout and save from it."""
    session = Session(run)
    load_into(session, source)
    save_checkpoint(target, run, session, PROGRESS)
    tear_down(session.world)


def pass_on(pool: RankPool, root: Path, model: dict[str, Any], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    """Hand a checkpoint from layout to layout; nothing of what it holds may change on the way."""
    pool.run(1, train_and_save, small_blocks(toy_run(**model)), root / "0")
    first = read_manifest(root / "0")
    assert len(first.tensors) > 50
    for number, (world_size, sizes) in enumerate(layouts):
        run = small_blocks(toy_run(**model, **sizes))
        pool.run(world_size, load_and_save, run, root / str(number), root / str(number + 1))
        found = read_manifest(root / str(number + 1))
        assert differences(first, found) == [], sizes
        # What is in one only is a copy in its own precision of a parameter; everything else is the same.
        common = first.tensors.keys() & found.tensors.keys()
        assert {name for name in common if first.tensors[name] != found.tensors[name]} == set(), sizes
        assert all(name.startswith("optimizer.") for name in first.tensors.keys() ^ found.tensors.keys())
        assert examine(found, lambda count: None).damages == []
        assert boxes_written(found) == boxes_foreseen(found, world_size), sizes


@pytest.mark.parametrize("name", MODELS)
def test_digests_are_the_same_in_every_layout(name: str, pool: RankPool, tmp_path: Path) -> None:
    pass_on(pool, tmp_path, MODELS[name], [LAYOUTS[layout] for layout in CHAINS[name]])


def test_digests_of_experts_are_the_same_in_every_layout(pool: RankPool, tmp_path: Path) -> None:
    layouts = [(world_size, sizes) for world_size, sizes, _ in MOE_LAYOUTS.values() if sizes.get("pp", 1) == 1]
    pass_on(pool, tmp_path, {"kind": "memory_plus+moe"}, layouts)


def test_a_table_is_written_in_row_blocks_by_those_who_hold_it(pool: RankPool, tmp_path: Path) -> None:
    # Four ranks, two column shards, two copies of each: the copies share the rows, and nobody writes what he lacks.
    world_size, sizes = LAYOUTS["mp2c-replicas"]
    run = small_blocks(toy_run(memory={"usage_interval": 1}, **sizes))
    pool.run(world_size, train_and_save, run, tmp_path / "saved")
    manifest = read_manifest(tmp_path / "saved")
    files = sorted({path for path, _ in manifest.pieces_of("memory.values")})
    assert [Path(path).name for path in files] == [
        f"rows-{first:010d}-{last:010d}.columns-{left:010d}-{right:010d}.safetensors"
        for first, last in ((0, 77), (77, 144))
        for left, right in ((0, 12), (12, 24))
    ]
    # 700 bytes are 7 rows of 24 numbers, whatever part of them a shard has.
    for name in ("memory.values", "memory.values.exp_avg", "memory.last_read"):
        boxes = [piece.box for _, piece in manifest.pieces_of(name) if piece.box is not None]
        assert {box.offset[0] % 7 for box in boxes} == {0}
        assert {box.sizes[0] for box in boxes} == {7, 4}
    assert manifest.tensors["memory.last_read"].kind == HISTORY
    assert len({path for path, _ in manifest.pieces_of("memory.last_read")}) == 2


def numbers_of(session: Session) -> dict[str, torch.Tensor]:
    """A rank's parameters and their optimizers' state, by names that are the same for the same layout."""
    found = {}
    for number, chunk in enumerate(session.model.chunks):
        found |= {f"{number}.{name}": param.detach().clone() for name, param in chunk.named_parameters()}
    for member_number, member in enumerate(session.optimizers.members):
        for number, state in enumerate(member.optimizer.state.values()):
            found |= {f"{member_number}.{number}.{key}": value.clone() for key, value in state.items()}
    return found


def load_as_megatron_does(run: RunConfig, source: Path) -> list[str]:
    """Load the dense part into a model and its optimizer with megatron alone; returns what is not as we load it."""
    session = Session(run)
    load_into(session, source)
    expected = numbers_of(session)
    tear_down(session.world)
    session = Session(replace(run, train=replace(run.train, seed=5)))
    wanted = _sharded_state(session.model, session.optimizers, loading=True)
    state = mcore.dist_checkpointing.load(wanted, str(source / "dense"))
    for number, chunk in enumerate(session.model.chunks):
        chunk.load_state_dict(state["model" if len(session.model.chunks) == 1 else f"model{number}"])
    session.optimizers.dense.load_state_dict(state["optimizer"])
    found = numbers_of(session)
    tear_down(session.world)
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize(
    ("saved_in", "model", "layout"),
    [
        ((4, {"tp": 2, "pp": 2}), {"kind": "dense", "dtype": "bf16"}, (4, {"tp": 2, "pp": 2})),
        ((2, {"tp": 2}), {"kind": "memory_plus"}, (2, {"pp": 2})),
        ((2, {"distributed_optimizer": True}), {"kind": "memory"}, (4, {"tp": 2, "distributed_optimizer": True})),
    ],
    ids=["tp2pp2-bf16", "tp2-to-pp2", "distributed-optimizer"],
)
def test_megatron_reads_the_dense_part_by_itself(
    saved_in: tuple[int, dict[str, Any]],
    model: dict[str, Any],
    layout: tuple[int, dict[str, Any]],
    pool: RankPool,
    tmp_path: Path,
) -> None:
    pool.run(saved_in[0], train_and_save, small_blocks(toy_run(**model, **saved_in[1])), tmp_path / "saved")
    found = pool.run(layout[0], load_as_megatron_does, toy_run(**model, **layout[1]), tmp_path / "saved")
    assert found == [[]] * layout[0]


def continue_run(run: RunConfig, source: Path) -> list[tuple[float, float, float]]:
    """Load, and train two more steps."""
    session = Session(run)
    session.optimizers.watching = False
    load_into(session, source)
    reports = [session.step(step) for step in (2, 3)]
    tear_down(session.world)
    return [(report.loss, report.grad_norm, report.memory_grad_norm) for report in reports]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_plain_and_distributed_optimizers_continue_each_other(dtype: str, pool: RankPool, tmp_path: Path) -> None:
    plain, distributed = (toy_run(dtype=dtype, distributed_optimizer=on) for on in (False, True))
    for number, run in enumerate((plain, distributed)):
        source = tmp_path / str(number)
        pool.run(2, train_and_save, run, source)
        (own, *_), (other, *_) = (pool.run(2, continue_run, each, source) for each in (plain, distributed))
        for mine, theirs in zip(own, other, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6 if dtype == "float32" else 1e-2)


def test_chains_go_through_all_layouts() -> None:
    # Otherwise they would show less than they say.
    assert {layout for chain in CHAINS.values() for layout in chain} == LAYOUTS.keys()
