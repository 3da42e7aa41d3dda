"""`mempar convert` between layouts: equal digests, the files of that layout's ranks, runs that go on from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layout_cases import LAYOUTS
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import Manifest, read_manifest
from mempar.runtime.config import RunConfig
from mempar.tools.convert.command import convert
from mempar.tools.verify import differences, examine
from rank_pool import RankPool
from shares import boxes_foreseen, boxes_written, elements_of_ranks, lie_within
from test_digest_law import MODELS, continue_run, load_as_megatron_does, small_blocks, train_and_save
from toy import Session, toy_run
from toy_checkpoints import load_into

# Layouts of every kind: uneven rows, grids, pipelines with one table and with copies of it, virtual stages, replicas,
# the distributed optimizer and back. The first model goes through all of them, the others through a part.
CHAIN: list[tuple[int, str]] = [
    (3, "mp=3 mp_rows=3"),
    (4, "tp=2 mp=4 mp_rows=2"),
    (4, "pp=2 mp=2 mp_rows=1"),
    (4, "pp=2 vpp=2 mp=2 mp_rows=2 distributed_optimizer=true"),
    (6, "mp=2 mp_rows=1 dp=6 distributed_optimizer=false"),
    (6, "mp=6 mp_rows=3 mp_hops=2"),
    (4, "tp=2 dp=2 distributed_optimizer=true"),
    (1, "distributed_optimizer=false"),
]

OPTIONS: dict[str, Any] = {
    "form": "mempar",
    "weights_only": False,
    "dtype": "",
    "max_memory": "64MiB",
    "workers": 2,
    "resume": False,
    "dry_run": False,
    "say": lambda line: None,
}


def converted(source: Path, destination: Path, layout: str, **options: Any) -> Manifest:
    convert(source, destination, layout.split(), **(OPTIONS | options))
    return read_manifest(destination)


@pytest.mark.parametrize("name", MODELS)
def test_conversions_through_layouts_keep_every_digest(name: str, pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, small_blocks(toy_run(**MODELS[name])), tmp_path / "0")
    first = read_manifest(tmp_path / "0")
    place = list(MODELS).index(name)
    chain = CHAIN if place == 0 else [*CHAIN[place:-1:3], CHAIN[-1]]
    for number, (world, layout) in enumerate(chain):
        found = converted(tmp_path / str(number), tmp_path / str(number + 1), layout)
        assert differences(first, found) == [], layout
        common = first.tensors.keys() & found.tensors.keys()
        assert {tensor for tensor in common if first.tensors[tensor] != found.tensors[tensor]} == set(), layout
        assert examine(found, lambda count: None).damages == []
        assert found.about["layout"]["world"] == world
        check_files(found, world)
    # Back where it began, with what it had.
    assert found.tensors == first.tensors
    assert replace(read_config(found), parallel=read_config(first).parallel) == read_config(first)


def check_files(manifest: Manifest, world: int) -> None:
    """Every rank's files hold what the rank would have saved."""
    written, foreseen = boxes_written(manifest), boxes_foreseen(manifest, world)
    assert elements_of_ranks(written) == elements_of_ranks(foreseen)
    assert lie_within(written, foreseen)
    tables = {path: boxes for path, boxes in foreseen.items() if path.startswith("tables/")}
    assert {path: boxes for path, boxes in written.items() if path.startswith("tables/")} == tables


def test_experts_move_between_ranks(pool: RankPool, tmp_path: Path) -> None:
    run = small_blocks(toy_run(kind="memory_plus+moe", sequence_parallel=True, tp=2, ep=2, mp=2, mp_rows=1))
    pool.run(4, train_and_save, run, tmp_path / "0")
    first = read_manifest(tmp_path / "0")
    for number, (world, layout) in enumerate([(4, "ep=4"), (4, "pp=2 ep=2 mp=2 mp_rows=2"), (2, "tp=2")]):
        found = converted(tmp_path / str(number), tmp_path / str(number + 1), layout)
        assert differences(first, found) == []
        check_files(found, world)


def go_on(run: RunConfig, source: Path) -> list[tuple[float, float, float]]:
    """Load, and train three more steps."""
    session = Session(run)
    session.optimizers.watching = False
    load_into(session, source)
    reports = [session.step(step) for step in (2, 3, 4)]
    tear_down(session.world)
    return [(report.loss, report.grad_norm, report.memory_grad_norm) for report in reports]


@pytest.mark.parametrize("layout", ["mp3r", "mp6g2h", "tp2sp-mp4g", "pp2-mp2r", "pp2vpp2-mp2c", "mp2c-replicas"])
def test_training_goes_on_from_a_conversion_within_the_layout_law(layout: str, pool: RankPool, tmp_path: Path) -> None:
    world, sizes = LAYOUTS[layout]
    model: dict[str, Any] = {"dtype": "float64", "ragged": layout == "mp3r"}
    pool.run(1, train_and_save, small_blocks(toy_run(**model)), tmp_path / "single")
    (whole,) = pool.run(1, go_on, toy_run(**model), tmp_path / "single")
    keys = " ".join(f"{key}={value}" for key, value in sizes.items())
    converted(tmp_path / "single", tmp_path / "there", f"{keys} dp={world // sizes.get('tp', 1) // sizes.get('pp', 1)}")
    run = toy_run(**model, **sizes)
    for found in pool.run(world, go_on, run, tmp_path / "there"):
        for before, after in zip(whole, found, strict=True):
            assert after[0] == pytest.approx(before[0], rel=1e-9)
            assert after[1:] == pytest.approx(before[1:], rel=1e-6)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_megatron_reads_what_was_converted(distributed: bool, dtype: str, pool: RankPool, tmp_path: Path) -> None:
    # From the other kind of optimizer, whose state is spelt otherwise.
    run = toy_run(dtype=dtype, distributed_optimizer=not distributed)
    pool.run(2, train_and_save, small_blocks(run), tmp_path / "saved")
    kind = f"distributed_optimizer={str(distributed).lower()}"
    converted(tmp_path / "saved", tmp_path / "there", f"tp=2 dp=2 {kind}")
    wanted = toy_run(dtype=dtype, tp=2, distributed_optimizer=distributed)
    assert pool.run(4, load_as_megatron_does, wanted, tmp_path / "there") == [[]] * 4
    (own, *_) = pool.run(2, continue_run, run, tmp_path / "saved")
    (other, *_) = pool.run(4, continue_run, wanted, tmp_path / "there")
    for before, after in zip(own, other, strict=True):
        assert after == pytest.approx(before, rel=1e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_weights_alone_begin_a_run_anew(dtype: str, pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, small_blocks(toy_run(kind="peer")), tmp_path / "saved")
    found = converted(tmp_path / "saved", tmp_path / "there", "mp=2 mp_rows=1", weights_only=True, dtype=dtype)
    assert found.weights_only and found.progress == {"step": 0, "applied_steps": 0}
    first = read_manifest(tmp_path / "saved")
    names = {name for name, record in first.tensors.items() if record.kind == "weights"}
    assert found.tensors.keys() == names
    if not dtype:
        assert all(found.tensors[name] == first.tensors[name] for name in names)
    assert read_config(found).train.dtype == (dtype or "float32")
    # Any optimizer of tables may follow, and masters begin as the weights.
    run = toy_run(kind="peer", optimizer="row_adagrad", dtype=dtype or "float32", mp=2, mp_rows=1)
    states = pool.run(2, load_anew, run, tmp_path / "there")
    assert all(masters_equal and rest_is_zero for masters_equal, rest_is_zero in states)


def load_anew(run: RunConfig, source: Path) -> tuple[bool, bool]:
    """Load weights: whether masters are equal to the values, and all other state is zero."""
    session = Session(run)
    load_into(session, source)
    masters = [
        (table.shard.values, session.optimizers.tables[table.name].state.get("master"))
        for table in session.model.tables
    ]
    equal = all(master is None or bool((master == values.to(master.dtype)).all()) for values, master in masters)
    states = [session.optimizers.tables[table.name].state for table in session.model.tables]
    zero = all(not tensor.any() for state in states for name, tensor in state.items() if name != "master")
    for member in session.optimizers.members:
        for state in member.optimizer.state.values():
            zero &= not (state["exp_avg"].any() or state["exp_avg_sq"].any())
    steps = [optimizer.step for optimizer in session.optimizers.tables.values()]
    report = session.step(0)
    tear_down(session.world)
    return equal, zero and steps == [0] * len(steps) and report.applied
