"""The memory estimate against what is allocated: layouts, precisions, recomputation, and the peak of whole steps.

Weights, gradients and states must agree byte for byte. What a forward pass keeps agrees with what autograd saves, up
to where the data decide which rank owns a row or an expert. The peaks are the allocator's: what gloo's threads free is
in none of its events, so layouts with collectives of megatron's are left out there.
"""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from allocated import Allocated, allocated, peak_of_step
from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.recipes import RECIPES
from mempar.runtime.config import HardwareConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.estimate import check_fits, estimate
from mempar.runtime.estimate.activations import chunk_bytes, softmax_bytes
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.passes import largest_kept
from mempar.runtime.estimate.report import stage_bytes
from mempar.runtime.estimate.reserved import reserved_bytes
from mempar.runtime.estimate.tables import table_bytes, touched_rows
from mempar.runtime.slot_trace import SlotTrace
from rank_pool import RankPool
from test_memory_footprint import wide_run
from toy import toy_run

ALL = ("mlp", "core_attn")
# name: ranks, run. Where rows or experts have several owners, the data decide what each of them keeps.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (1, {"kind": "dense", "ragged": True}),
    "dense-bf16-tp2": (2, {"kind": "dense", "tp": 2, "dtype": "bf16"}),
    "dense-float64": (1, {"kind": "dense", "dtype": "float64", "tied": True}),
    "dense-full": (1, {"kind": "dense", "recompute": "full"}),
    "dense-pp2-tied-do-bf16": (
        4,
        {"kind": "dense", "pp": 2, "vpp": 2, "tied": True, "distributed_optimizer": True, "dtype": "bf16"},
    ),
    "dense-selective-tp2sp": (
        2,
        {"kind": "dense", "tp": 2, "sequence_parallel": True, "recompute": "selective", "recompute_modules": ALL},
    ),
    "memory_plus": (1, {"extras": True, "optimizer": "adamw"}),
    "memory_plus-full": (1, {"kind": "beside", "recompute": "full", "ragged": True}),
    "memory_plus-selective": (1, {"recompute": "selective", "optimizer": "row_adagrad"}),
    "memory_plus-columns-do": (2, {"mp": 2, "mp_rows": 1, "distributed_optimizer": True}),
    "memory_plus-rows-bf16": (2, {"mp": 2, "mp_rows": 2, "dtype": "bf16"}),
    "memory_plus-grid": (6, {"mp": 6, "mp_rows": 3, "optimizer": "row_adagrad", "ragged": True, "micro_batches": 12}),
    "memory_plus-tp2-rows": (2, {"tp": 2, "mp": 2, "mp_rows": 2}),
    "memory_plus-pp2-copies": (2, {"pp": 2, "recompute": "selective", "recompute_modules": ("core_attn",)}),
    "peer": (1, {"kind": "peer", "tied": True}),
    "peer-tp2": (2, {"kind": "peer", "tp": 2}),
    "peer-rows": (2, {"kind": "peer", "mp": 2, "mp_rows": 2, "dtype": "bf16"}),
    "two-pp2": (2, {"kind": "two", "pp": 2}),
    "moe": (1, {"kind": "moe", "recompute": "selective"}),
    "moe-ep2-pp2-do": (4, {"kind": "moe", "pp": 2, "ep": 2, "distributed_optimizer": True, "dtype": "bf16"}),
    "moe-ep2-tp2sp": (4, {"kind": "memory_plus+moe", "ep": 2, "tp": 2, "sequence_parallel": True}),
}
ROUTED = ("rows", "grid", "ep2")


@pytest.fixture(scope="module")
def seen(pool: RankPool) -> dict[str, list[Allocated]]:
    """What each of the runs allocated, rank by rank."""
    jobs = {name: pool.submit(ranks, allocated, toy_run(**settings)) for name, (ranks, settings) in RUNS.items()}
    return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_held_is_estimated_byte_for_byte(name: str, seen: dict[str, list[Allocated]]) -> None:
    num_ranks, settings = RUNS[name]
    layout = Layout.of(toy_run(**settings), num_ranks)
    for rank, found in enumerate(seen[name]):
        stage = layout.grid.stage_of(rank)
        dense, tables = dense_bytes(layout, stage, rank), table_bytes(layout, stage, rank)
        assert found.held == {
            "weights": dense.weights,
            "gradients": dense.gradients,
            "optimizer_state": dense.state,
            "table_values": tables.values,
            "table_state": tables.state,
        }, rank
        most = stage_bytes(layout, stage)
        assert all(size <= getattr(most, kind) for kind, size in found.held.items())


@pytest.mark.parametrize("name", RUNS)
def test_what_a_forward_pass_keeps_is_estimated(name: str, seen: dict[str, list[Allocated]], note_figure: Any) -> None:
    num_ranks, settings = RUNS[name]
    layout = Layout.of(toy_run(**settings), num_ranks)
    routed = any(mark in name for mark in ROUTED)
    for rank, found in enumerate(seen[name]):
        chunks = layout.chunks_of(layout.grid.stage_of(rank))
        formula = [chunk_bytes(layout, each) + each.is_last * softmax_bytes(layout) for each in chunks]
        assert {chunk for chunk, _ in found.kept} == set(range(len(chunks)))
        for chunk, kept in found.kept:
            deviation = abs(formula[chunk] / kept - 1)
            note_figure(f"activations over their formula, {'routed' if routed else 'others'}", deviation)
            assert deviation < (0.05 if routed else 0.002), (rank, chunk, kept, formula)


@pytest.mark.parametrize("name", [name for name in RUNS if "memory" in name or "peer" in name or "two" in name])
def test_records_are_estimated(name: str, seen: dict[str, list[Allocated]]) -> None:
    num_ranks, settings = RUNS[name]
    layout = Layout.of(toy_run(**settings), num_ranks)
    for rank, found in enumerate(seen[name]):
        formula = table_bytes(layout, layout.grid.stage_of(rank), rank).records
        assert found.records == pytest.approx(formula, rel=0.1 if any(mark in name for mark in ROUTED) else 0)


@pytest.mark.parametrize(("num_ranks", "sizes"), [(1, {}), (2, {"mp": 2, "mp_rows": 1})])
def test_a_limit_of_records_bounds_them(num_ranks: int, sizes: dict[str, int], pool: RankPool) -> None:
    run = wide_run(8, memory={"deposit_bytes": 400_000}, **sizes)
    whole = Layout.of(wide_run(8, **sizes), num_ranks)
    layout = Layout.of(run, num_ranks)
    for rank, found in enumerate(pool.run(num_ranks, allocated, run)):
        formula = table_bytes(layout, 0, rank)
        assert 0.5 * formula.records < found.most_records <= formula.records < table_bytes(whole, 0, rank).records
        assert formula.early_sums


def larger(**settings: Any) -> RunConfig:
    """A toy run whose activations are what takes memory."""
    run = toy_run(**settings)
    return replace(
        run,
        model=replace(run.model, hidden_size=64, ffn_hidden_size=192, vocab_size=512),
        train=replace(run.train, seq_length=64, micro_batch_size=4, global_batch_size=2 * run.train.global_batch_size),
    )


def even_reads(run: RunConfig) -> SlotTrace:
    """Slots of two steps that fall evenly on the table, as the estimate takes them to."""
    trace, memory, rng = SlotTrace(), run.memory, np.random.default_rng(5)
    for step in range(2):
        for block in memory.layers:
            for sample in range(2 * run.train.global_batch_size):
                shape = (run.train.seq_length, memory.heads, memory.top_k)
                trace.slots[step, block, sample] = rng.integers(0, memory.num_slots, shape, dtype=np.int32)
    return trace


BF16_TABLE = {"dtype": "bf16", "rounding": "stochastic", "moments_dtype": "bf16"}
PEAKS: dict[str, tuple[int, RunConfig]] = {
    "dense": (1, larger(kind="dense", micro_batches=2)),
    "dense-bf16": (1, larger(kind="dense", dtype="bf16", micro_batches=2)),
    "dense-full": (1, larger(kind="dense", recompute="full", micro_batches=2)),
    "dense-selective": (1, larger(kind="dense", recompute="selective", recompute_modules=ALL, micro_batches=2)),
    "dense-pp2-vpp2": (2, larger(kind="dense", pp=2, vpp=2, micro_batches=8)),
    "moe": (1, larger(kind="moe", micro_batches=2)),
    "memory_plus-columns": (2, larger(mp=2, mp_rows=1, micro_batches=8)),
    "peer": (1, larger(kind="peer", micro_batches=4)),
    "table-bf16": (1, wide_run(32, memory=BF16_TABLE)),
    "table-rows": (2, wide_run(32, mp=2, mp_rows=2, optimizer="row_adagrad")),
    "table-replicas": (3, wide_run(32)),
    "table-large-replicas": (2, wide_run(64)),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_of_a_step_is_estimated(name: str, pool: RankPool, note_figure: Any) -> None:
    num_ranks, run = PEAKS[name]
    layout = Layout.of(run, num_ranks)
    replay = even_reads(layout.run) if name.startswith("table") else None
    for rank, peak in enumerate(pool.run(num_ranks, peak_of_step, run, replay)):
        found = stage_bytes(layout, layout.grid.stage_of(rank))
        note_figure("peak of a step over its estimate", abs(found.total / peak - 1))
        assert found.total == pytest.approx(peak, rel=0.1), (rank, found)
        # What a test of the total is worth: the parts that are not byte for byte are large.
        assert found.total > 1.3 * found.held


@pytest.mark.parametrize(
    ("stage", "kept"),
    # 1F1B has p - i micro-batches in flight; interleaved, 2 (p - i - 1) + (v - 1) p + 1 parts, of chunks 1 and 100.
    [(0, [4, 4 * 1 + 4 * 100 + 3]), (1, [3, 4 * 1 + 4 * 100 + 1]), (3, [1, 4 * 1 + 1 * 100])],
)
def test_micro_batches_in_flight(stage: int, kept: list[int]) -> None:
    shape = ModelConfig(num_layers=8, vocab_size=64)
    train = TrainConfig(global_batch_size=16, micro_batch_size=1)
    found = []
    for vpp, chunks in ((1, [1]), (2, [1, 100])):
        run = RunConfig(model=shape, train=train, parallel=ParallelConfig(pp=4, vpp=vpp))
        found.append(largest_kept(Layout.of(run, 4), stage, chunks))
    assert found == kept


@pytest.mark.parametrize(("num_rows", "entries"), [(1, 5), (1000, 10), (1000, 1000), (1000, 20000)])
def test_even_reads_touch_as_many_rows_as_expected(num_rows: int, entries: int) -> None:
    rng = np.random.default_rng(7)
    drawn = np.mean([len(np.unique(rng.integers(0, num_rows, entries))) for _ in range(50)])
    assert touched_rows(num_rows, entries) == pytest.approx(drawn, rel=0.02, abs=1)


SHAPES = {
    "8b": ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336,
        vocab_size=128256,
    ),
    "1.3b": ModelConfig(
        num_layers=22, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5632, vocab_size=32000
    ),
}  # fmt: skip


def big(shape: str, *, num_subkeys: int, seq_length: int = 4096, batch: int = 256, size: int = 2, **given: Any) -> Any:
    """A run of a published shape on H200."""
    model = SHAPES[shape]
    memory = {"layers": (4, 12, 20), "num_subkeys": num_subkeys, "key_dim": model.hidden_size // 2}
    return RunConfig(
        model=model,
        memory=MemoryConfig(**{**memory, **given.pop("memory", {})}),
        train=TrainConfig(dtype="bf16", seq_length=seq_length, global_batch_size=batch, micro_batch_size=size),
        parallel=ParallelConfig(distributed_optimizer=True, **given),
        hardware=HardwareConfig(gpu="h200"),
    )


@pytest.mark.parametrize(("rows", "gigabytes"), [(8, 26.3), (1, 7.25)])
def test_records_of_the_8b_shape(rows: int, gigabytes: float) -> None:
    # 3 layers x 8 micro-batches of 16384 tokens on each of 8 ranks; D_j b + 10 M / R bytes a token.
    run = big("8b", num_subkeys=4096, seq_length=8192, batch=128, mp=8, mp_rows=rows)
    assert estimate(run, 8).worst.records / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_large_table_on_few_gpus_wants_adagrad_and_rounding() -> None:
    run = big("1.3b", num_subkeys=8192, mp=8, memory={"optimizer": "row_adagrad"})
    # 137.4G bf16 values on 8 ranks, and their float32 masters.
    found = estimate(run, 8).worst
    assert found.table_values == 2 * 8192**2 * 2048 // 8
    assert found.table_state > 2 * found.table_values
    with pytest.raises(
        ConfigError, match=r"needs 200\.\d GiB a GPU on 8 ranks .*has 140\.4 GiB.*memory\.rounding"
    ) as at:
        check_fits(run, 8)
    assert "still too much" in str(at.value)
    fitting = replace(run, memory=replace(run.memory, rounding="stochastic"))
    assert check_fits(fitting, 8).fits(run.hardware.kind)
    assert check_fits(big("1.3b", num_subkeys=8192, mp=64), 64).worst.total < 0.6 * run.hardware.kind.memory_bytes


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"seq_length": 8192, "batch": 512, "size": 1, "mp": 64}, "parallel.mp_rows=2"),
        ({"seq_length": 8192, "batch": 512, "size": 1, "mp": 64}, "train.recompute=full"),
        ({"seq_length": 8192, "batch": 4096, "size": 1, "mp": 64, "tp": 2, "sequence_parallel": True}, "deposit_bytes"),
        ({"seq_length": 8192, "batch": 512, "size": 4, "mp": 32, "mp_rows": 1}, "train.micro_batch_size=2"),
        ({"seq_length": 2048, "batch": 512, "size": 1, "mp": 4}, "parallel.mp=8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=r"needs .* GiB .* ranks .*hardware\.gpu=h200 has .*; try ") as refused:
        check_fits(big("8b", num_subkeys=4096, **settings), 128)
    assert remedy in str(refused.value)


def test_dense_model_that_is_too_large_is_told_to_distribute_its_optimizer() -> None:
    run = replace(big("8b", num_subkeys=64, size=1), memory=MemoryConfig(enabled=False))
    check_fits(run, 64)
    run = run.with_parallel(distributed_optimizer=False)
    with pytest.raises(ConfigError, match=r"optimizer state 8\d\.\d GiB.*parallel\.distributed_optimizer=true"):
        check_fits(run, 64)


def test_runs_for_cpus_are_not_judged() -> None:
    run = replace(big("8b", num_subkeys=4096, mp=2), hardware=HardwareConfig())
    found = check_fits(run, 2)
    assert found.worst.total > 500e9
    assert found.worst.reserved == 0


def test_communicators_take_more_where_each_sends_to_each() -> None:
    run = big("1.3b", num_subkeys=1024)
    dense = replace(run, memory=MemoryConfig(enabled=False))
    runs = [(dense, 8), (run.with_parallel(mp=8), 8), (run.with_parallel(mp=64), 64)]
    sizes = [reserved_bytes(Layout.of(each, ranks), 0) for each, ranks in runs]
    # 3.28 GB for all-to-alls in a node of eight, and a buffer for the network.
    assert sizes == [sizes[0], sizes[0] + 7 * 470_000_000, sizes[0] + 7 * 470_000_000 + (512 << 20)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_what_they_are_meant_for(name: str) -> None:
    run = RECIPES[name]()
    found = check_fits(run, run.num_gpus)
    assert len(found.stages) == run.parallel.pp
    assert found.worst.total == max(stage.total for stage in found.stages) > 0


def test_estimating_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; from mempar.recipes import find_recipe; from mempar.tools.estimate_table import estimate_table; "
        "from mempar.runtime.estimate import check_fits; "
        "print(estimate_table(check_fits(find_recipe('smoke'), 1), None)); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'triton')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MiB" in done.stdout


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 ranks"):
        estimate(toy_run(), 0)
