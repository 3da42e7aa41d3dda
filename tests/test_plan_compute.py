"""How long a rank computes: closed forms by hand on a device whose figures are round."""

import dataclasses

import pytest

from mempar.memory.config import MemoryConfig
from mempar.recipes import find_recipe
from mempar.runtime.config import ModelConfig, RunConfig, TrainConfig
from mempar.runtime.estimate.dense import DenseBytes, dense_bytes
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS, Hardware
from mempar.runtime.size import model_size
from mempar.tools.plan.compute import block_compute_us, head_compute_us, is_recomputed
from mempar.tools.plan.roofline import Roofline
from mempar.tools.plan.update import table_step, update_compute_us

# 1 TFLOP/s in either width, 1 GB/s: a byte takes a nanosecond; all of it is reached and nothing takes time by itself.
ROUND = dataclasses.replace(
    GPUS["h200"], bf16_tflops=1.0, float32_tflops=1.0, memory_gb_per_s=1.0, matmul_share=1.0, attention_share=1.0,
    memory_share=1.0, gather_share=1.0, row_overhead_bytes=0, kernel_us=0.0,
)  # fmt: skip
# Memory that takes no time: what remains is arithmetic.
ARITHMETIC = dataclasses.replace(ROUND, memory_gb_per_s=1e12)
SMALL = RunConfig(
    model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, vocab_size=256),
    memory=MemoryConfig(layers=(1,), num_subkeys=64, heads=2, top_k=8, key_dim=32, column_tile=16),
    train=TrainConfig(global_batch_size=8, micro_batch_size=2, seq_length=128),
)


def layout_of(run: RunConfig, ranks: int = 1) -> Layout:
    return Layout.of(run, ranks, run.model.vocab_size)


def test_roofline_takes_the_longer_of_arithmetic_and_bytes() -> None:
    roof = Roofline(ROUND, 2)
    # 2 * 1000^3 FLOPs at 10^6 a microsecond; 6 MB at 10^3 bytes a microsecond.
    assert roof.products(1000, 1000, 1000) == pytest.approx(6000)
    assert Roofline(ARITHMETIC, 2).products(1000, 1000, 1000) == pytest.approx(2000)
    assert Roofline(ARITHMETIC, 8).products(1000, 1000, 1000) == pytest.approx(4000), "float64 at half of float32"
    assert roof.rows(10, 500) == pytest.approx(5)
    wide = Roofline(dataclasses.replace(ROUND, row_overhead_bytes=500, gather_share=0.5), 2)
    assert wide.rows(10, 500) == pytest.approx(20)
    assert Roofline(dataclasses.replace(ROUND, kernel_us=3.0), 2).bytes(1000, 2) == pytest.approx(7)


def test_arithmetic_of_all_blocks_is_that_of_the_models_size() -> None:
    """Where memory takes no time, a micro-batch takes the FLOPs that size.py counts."""
    dense = dataclasses.replace(SMALL, memory=MemoryConfig(enabled=False))
    for run in (dense, SMALL):
        layout = layout_of(run)
        phases = [block_compute_us(run, layout, block, ARITHMETIC) for block in range(2)]
        head = head_compute_us(run, layout, ARITHMETIC)
        core = sum(block["core_attn"].forward for block in phases)
        counted = sum(phase.total for block in phases for phase in block.values()) + head.total
        tokens = run.train.micro_batch_size * run.train.seq_length
        flops = model_size(run, 256).flops_per_token * tokens
        # Scores for half keys are differentiated for chosen keys only, attention's backward pass has 5 products for 4.
        topk = sum(block["topk"].forward for block in phases if "topk" in block)
        assert counted == pytest.approx(flops / 1e6 + 0.5 * core - 2 * topk, rel=1e-4)


@pytest.mark.parametrize(("dtype", "a_parameter"), [("bf16", 10), ("float32", 12), ("float64", 24)])
def test_gradients_of_a_micro_batch_are_read_and_added(dtype: str, a_parameter: int) -> None:
    """Its own width read, the wide sum read and written; the output layer's and the embedding's with the loss."""
    run = dataclasses.replace(
        SMALL, train=dataclasses.replace(SMALL.train, dtype=dtype), memory=MemoryConfig(enabled=False)
    )
    layout = layout_of(run)
    sums = block_compute_us(run, layout, 0, ROUND)["gradient_sums"]
    # Attention 4 C^2, SwiGLU 3 C F, two norms.
    assert sums.forward == 0 and sums.backward == pytest.approx(
        1e-3 * a_parameter * (4 * 64**2 + 3 * 64 * 128 + 2 * 64)
    )
    tied = dataclasses.replace(run, model=dataclasses.replace(run.model, tie_embeddings=True))
    heads = [head_compute_us(each, layout_of(each), ROUND).backward for each in (run, tied)]
    assert heads[0] - heads[1] == pytest.approx(1e-3 * a_parameter * 256 * 64)
    whole = dense_bytes(layout, 0).gradients / layout.wide_bytes
    counted = sum(block_compute_us(run, layout, block, ROUND)["gradient_sums"].backward for block in range(2))
    assert counted == pytest.approx(1e-3 * a_parameter * (whole - 2 * 256 * 64 - 64))


@pytest.mark.parametrize(
    ("qk_norm", "score_dtype", "backend", "is_wide"),
    [
        (False, "float32", "triton", False),
        (True, "bf16", "triton", False),
        (True, "float32", "triton", True),
        (False, "bf16", "torch", True),
    ],
)
def test_half_keys_are_multiplied_in_the_width_of_the_kernels(
    qk_norm: bool, score_dtype: str, backend: str, is_wide: bool
) -> None:
    """Products of float32 operands where kernels make them: at 1 TFLOP/s, and at 4 in bf16."""
    run = dataclasses.replace(
        SMALL,
        memory=dataclasses.replace(SMALL.memory, qk_norm=qk_norm, score_dtype=score_dtype),
        train=dataclasses.replace(SMALL.train, dtype="bf16"),
        kernels=dataclasses.replace(SMALL.kernels, backend=backend),
    )
    topk = block_compute_us(run, layout_of(run), 1, dataclasses.replace(ARITHMETIC, bf16_tflops=4.0))["topk"]
    flops = 2 * (2 * 128) * 16 * 64 * 2 * 2
    assert topk.forward == pytest.approx(flops / 1e6 / (1 if is_wide else 4), rel=1e-6)


def test_rows_are_read_where_they_lie() -> None:
    """Owners of a quarter read a quarter of the bytes, and columns as many reads of narrower rows."""
    whole = block_compute_us(SMALL, layout_of(SMALL), 1, ROUND)["gather"].forward
    reads = 2 * 128 * 2 * 8
    assert whole == pytest.approx(1e-3 * (reads * 64 * 4 + 256 * 64 * 4))
    for rows in (4, 1):
        run = SMALL.with_parallel(mp=4, mp_rows=rows)
        layout = layout_of(run, 4)
        part = block_compute_us(run, layout, 1, ROUND)
        # Four ranks bring tokens: as many reads in all a rank, or four times as many, of a quarter of the columns.
        sums = 4 * 256 * 64 * 4 // (1 if rows == 4 else 4)
        joined = (rows + 1) * 256 * 64 * 4
        assert part["gather"].forward == pytest.approx(1e-3 * (reads * 64 * 4 + sums + joined), rel=1e-3)
        assert part["route"].forward == pytest.approx(1e-3 * reads * (40 if rows == 4 else 12))


def test_tensor_parallelism_cuts_products_but_not_memory_layers() -> None:
    run = SMALL.with_parallel(tp=2)
    one, two = (block_compute_us(each, layout_of(each, n), 1, ARITHMETIC) for each, n in ((SMALL, 1), (run, 2)))
    assert two["attention"].forward == pytest.approx(one["attention"].forward / 2)
    assert two["query"].forward == one["query"].forward
    shared = SMALL.with_parallel(tp=2, sequence_parallel=True)
    assert block_compute_us(shared, layout_of(shared, 2), 1, ARITHMETIC)["query"].forward == one["query"].forward / 2


def test_recomputation_names_what_runs_again() -> None:
    full, mlp, core = (
        TrainConfig(recompute=how, recompute_modules=modules)
        for how, modules in (("full", ("mlp",)), ("selective", ("mlp",)), ("selective", ("core_attn",)))
    )
    assert is_recomputed(full, "norms") and not is_recomputed(TrainConfig(), "mlp")
    assert is_recomputed(mlp, "gather") and is_recomputed(mlp, "mlp") and not is_recomputed(mlp, "core_attn")
    assert is_recomputed(core, "core_attn") and not is_recomputed(core, "gather")


def test_updates_grow_with_what_a_step_touches() -> None:
    layout = layout_of(SMALL)
    dense = dense_bytes(layout, 0)
    step = table_step(layout, "memory", 0)
    assert step.deposits.entries == 8 * 128 * 2 * 8 and step.deposits.tokens == 8 * 128
    assert 3900 < step.deposits.rows <= 4096 and step.copies == 1 and step.early_sums == 0
    once = update_compute_us(SMALL, layout, 0, dense, ROUND)
    assert set(once) == {"reduce_rows", "row_update", "dense_update"}
    bounded = dataclasses.replace(SMALL, memory=dataclasses.replace(SMALL.memory, deposit_bytes=100_000))
    early = table_step(layout_of(bounded), "memory", 0)
    assert early.early_sums == (16384 * 12 + 1024 * 64 * 4) // 100_000
    assert update_compute_us(bounded, layout_of(bounded), 0, dense, ROUND)["reduce_rows"] > once["reduce_rows"]
    exact = dataclasses.replace(SMALL, memory=dataclasses.replace(SMALL.memory, optimizer="row_adagrad"))
    assert update_compute_us(exact, layout_of(exact), 0, dense, ROUND)["row_update"] < once["row_update"]
    none = DenseBytes(weights=0, gradients=0, state=0)
    assert update_compute_us(SMALL, layout, 0, none, ROUND)["dense_update"] == 0


@pytest.mark.parametrize(
    "name", ["8b_dense_128xh100_bf16", "8b_memory_plus_16m_128xh100_bf16", "1.3b_moe4_64xh100_bf16"]
)
def test_published_models_reach_a_plausible_share_of_the_peak(name: str) -> None:
    """Compute alone, no communication: Llama-like models reach 40 to 60% of an H100's peak, communication included."""
    run = find_recipe(name)
    layout, hardware = Layout.of(run, run.num_gpus, 128256), GPUS["h100"]
    blocks = [block_compute_us(run, layout, block, hardware) for block in range(run.model.num_layers)]
    total = (
        sum(phase.total for block in blocks for phase in block.values()) + head_compute_us(run, layout, hardware).total
    )
    tokens = layout.tokens / layout.grid.tp
    share = model_size(run, 128256).flops_per_token * tokens / (total * 1e-6) / (hardware.bf16_tflops * 1e12)
    assert 0.35 < share < 0.73, f"{name}: {share:.2f}"


def test_more_of_anything_is_never_slower() -> None:
    layout = layout_of(SMALL)
    slow = ROUND

    def total(hardware: Hardware) -> float:
        return sum(phase.total for phase in block_compute_us(SMALL, layout, 1, hardware).values())

    for name in ("float32_tflops", "memory_gb_per_s"):
        assert total(dataclasses.replace(slow, **{name: 2.0})) <= total(slow)
