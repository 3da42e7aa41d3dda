"""Recipes of the published models: totals, FLOPs, layouts, batches, data, and names that tell the truth."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from mempar.memory.config import MemoryConfig
from mempar.recipes import find_recipe
from mempar.recipes.data_sets import DATA_SETS
from mempar.recipes.published import PUBLISHED
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import parse_spec, vocab_size
from mempar.runtime.hardware import GPUS
from mempar.runtime.placement import place
from mempar.runtime.preflight import check_layout
from mempar.runtime.size import ModelSize, model_size

# "Memory Layers at Scale", tables 1 and 2 and the names of its models, billions of parameters with the digits that are
# printed there; 8.03 is Llama 3 8B's.
TOTALS = {
    "134m_dense_8xh100_bf16": ".134",
    "134m_memory_1m_8xh100_bf16": ".937",
    "134m_memory_plus_1m_8xh100_bf16": ".937",
    "373m_dense_16xh100_bf16": ".373",
    "720m_dense_32xh100_bf16": ".720",
    "1.3b_dense_64xh100_bf16": "1.3",
    "1.3b_moe4_64xh100_bf16": "3.5",
    "1.3b_peer_590k_64xh100_bf16": "3.6",
    "1.3b_memory_1m_64xh100_bf16": "3.4",
    "1.3b_memory_plus_1m_64xh100_bf16": "3.377",
    "1.3b_memory_plus_4m_64xh100_bf16": "9.823",
    "1.3b_memory_plus_16m_64xh100_bf16": "35.618",
    "1.3b_memory_plus_64m_64xh200_bf16": "138.748",
    "8b_dense_128xh100_bf16": "8.03",
}
NAME = re.compile(
    r"(?P<base>134m|373m|720m|1\.3b|8b)_(?P<model>dense|moe(?P<experts>\d+)|"
    r"(?P<variant>peer|memory|memory_plus)_(?P<slots>\d+[km]))_(?P<gpus>\d+)x(?P<gpu>h100|h200)_(?P<dtype>bf16)"
)
ALL = pytest.mark.parametrize("name", PUBLISHED)


def size_of(run: RunConfig) -> ModelSize:
    return model_size(run, vocab_size(run))


def dense_of(run: RunConfig) -> RunConfig:
    """The base model of a run."""
    base = run.name.split("_")[0]
    return find_recipe(next(name for name in PUBLISHED if name.startswith(f"{base}_dense_")))


def test_list_has_every_base_with_every_model() -> None:
    bases = ("134m", "373m", "720m", "1.3b")
    models = {name.rpartition("_")[0].rpartition("_")[0] for name in PUBLISHED}
    wanted = {f"{base}_{model}" for base in bases for model in ("dense", "peer_590k", "memory_1m", "memory_plus_1m")}
    wanted |= {f"{base}_moe{experts}" for base, experts in zip(bases, (16, 8, 6, 4), strict=True)}
    wanted |= {f"1.3b_memory_plus_{slots}" for slots in ("4m", "16m", "64m")} | {"8b_dense", "8b_memory_plus_16m"}
    assert models == wanted and len(PUBLISHED) == len(wanted) == 25


@pytest.mark.parametrize(("name", "printed"), TOTALS.items())
def test_totals_match_the_published_models(name: str, printed: str, note_figure: Callable[[str, float], None]) -> None:
    """Within 1% of a number that is printed as the published one."""
    billions = size_of(find_recipe(name)).total_params / 1e9
    published, last_digit = float(printed), 10.0 ** -len(printed.partition(".")[2])
    deviation = max(0.0, abs(billions - published) - last_digit / 2) / published
    note_figure("recipes: totals beside the published ones", deviation)
    assert deviation < 0.01, f"{billions:.4f}B beside {printed}B"


def test_largest_tables_have_the_published_sizes() -> None:
    """16M slots of 4096 columns are the published 64B, and 64M of 2048 the 128B, in units of 2^30."""
    assert size_of(find_recipe("8b_memory_plus_16m_128xh100_bf16")).memory_params == 64 * 2**30
    assert size_of(find_recipe("1.3b_memory_plus_64m_64xh200_bf16")).memory_params == 128 * 2**30


@ALL
def test_tables_never_count_as_active_nor_as_flops(name: str) -> None:
    run = find_recipe(name)
    size, memory = size_of(run), run.memory
    if not memory.enabled:
        assert size.memory_params == 0
        return
    tables = len(memory.table_names)
    reads = tables * len(memory.layers) * memory.heads * memory.top_k * run.model.hidden_size
    assert size.memory_params == tables * memory.num_slots * run.model.hidden_size
    assert size.total_params == size.active_params - reads + size.memory_params
    # Four times the slots cost twice the sub-keys, and twice the rows read cost nothing.
    larger = size_of(replace(run, memory=replace(memory, num_subkeys=2 * memory.num_subkeys)))
    keys = len(memory.layers) * memory.heads * memory.num_subkeys * memory.key_dim
    assert larger.flops_per_token - size.flops_per_token == 6 * keys
    assert size_of(replace(run, memory=replace(memory, top_k=64))).flops_per_token == size.flops_per_token


@ALL
def test_flops_are_within_four_percent_of_the_base_model(name: str, note_figure: Callable[[str, float], None]) -> None:
    run = find_recipe(name)
    ratio = size_of(run).flops_per_token / size_of(dense_of(run)).flops_per_token
    note_figure(f"recipes: FLOPs of {'experts' if run.moe.enabled else 'memory'} beside dense", abs(ratio - 1))
    assert abs(ratio - 1) < (0.002 if run.moe.enabled else 0.04)
    # A layer of 1M slots costs less than the feed-forward network in whose place it stands.
    assert ratio < 1 or run.memory.num_slots > 2**24 or not run.memory.enabled


def test_models_of_a_base_differ_in_their_memory_alone() -> None:
    for name in PUBLISHED:
        run = find_recipe(name)
        dense = dense_of(run)
        assert (run.model, run.train, run.optim, run.data) == (dense.model, dense.train, dense.optim, dense.data)
        assert run.hardware.gpus == dense.hardware.gpus


def test_memory_layers_stand_where_the_published_ones_do() -> None:
    layers = {name: run.memory.layers for name in PUBLISHED if (run := find_recipe(name)).memory.enabled}
    expected = {"134m": (2, 6, 10), "373m": (4, 12, 20), "720m": (3, 11, 19), "1.3b": (3, 11, 19), "8b": (8, 16, 24)}
    for name, blocks in layers.items():
        three = expected[name.split("_")[0]]
        assert blocks == (three if "memory_plus" in name else three[1:2])


@ALL
def test_name_says_what_the_config_is(name: str) -> None:
    said, run = NAME.fullmatch(name), find_recipe(name)
    assert said is not None and run.name == name
    assert (run.hardware.gpus, run.hardware.gpu, run.train.dtype) == (int(said["gpus"]), said["gpu"], said["dtype"])
    assert run.moe.num_experts == int(said["experts"] or 0)
    assert run.memory.enabled == (said["variant"] is not None)
    if said["variant"]:
        unit = {"k": 1000, "m": 2**20}[said["slots"][-1]]
        assert run.memory.variant == said["variant"] and run.memory.dtype == said["dtype"]
        assert round(run.memory.num_slots / unit) == int(said["slots"][:-1])


@ALL
def test_layout_uses_its_gpus_without_padding(name: str) -> None:
    run = find_recipe(name)
    resolved = check_layout(run, run.num_gpus)
    placement = place(resolved, run.num_gpus)
    grid, node = placement.grid, GPUS[run.hardware.gpu].gpus_per_node
    assert resolved == run, "micro-batch and virtual stages are given"
    assert grid.world == grid.tp * grid.cp * grid.pp * grid.dp == run.hardware.gpus
    assert grid.cp == 1 and grid.world % node == 0 and node % grid.tp == 0
    assert placement.num_padding == 0
    assert run.parallel.distributed_optimizer and run.parallel.sequence_parallel == (grid.tp > 1)
    for memory in placement.memories.values():
        # Row shards inside a node, and shards of equal size.
        plan = memory.plan
        assert node % plan.num_row_shards == 0
        assert len({part.num_rows * part.num_columns for part in map(plan.part_of, range(plan.num_shards))}) == 1
        assert (run.parallel.mp_hops == 2) == (plan.num_shards > node)


@ALL
def test_a_shard_with_state_and_gradients_leaves_room(name: str) -> None:
    """Values, state, and gradients while they are summed, of a shard that is touched whole, take under half a GPU."""
    run = find_recipe(name)
    if not run.memory.enabled:
        return
    copies = run.hardware.gpus // run.parallel.mp
    shard = size_of(run).memory_params / run.parallel.mp
    state = 2 + (4 if run.memory.rounding == "master" else 0) + 2 * (2 if run.memory.moments_dtype == "bf16" else 4)
    gradients = 4 * (2 if copies == 1 else 2 + copies)
    held = shard * (state + gradients) + run.memory.deposit_bytes
    assert held < 0.5 * GPUS[run.hardware.gpu].memory_bytes, f"{held / 2**30:.1f} GiB"


@ALL
def test_a_run_sees_a_trillion_tokens(name: str) -> None:
    train = find_recipe(name).train
    assert train.steps * train.global_batch_size * train.seq_length == pytest.approx(1e12, rel=1e-3)
    assert train.global_batch_size * train.seq_length == 2**23


@ALL
def test_data_are_a_blend_of_known_sets(name: str) -> None:
    run = find_recipe(name)
    assert sum(run.data.weights) == pytest.approx(1.0, abs=1e-12)
    assert len(run.data.weights) == len(set(run.data.paths)) == len(run.data.paths)
    assert all(path.rpartition("/")[2] in DATA_SETS for path in run.data.paths)
    assert parse_spec(run.data.tokenizer).kind == "hf"
    assert vocab_size(run) == run.model.vocab_size == (128256 if name.startswith("8b") else 32000)


def test_updates_follow_the_published_rates() -> None:
    for name in PUBLISHED:
        run = find_recipe(name)
        assert (run.optim.lr, run.optim.min_lr, run.optim.warmup_steps) == (1e-4, 1e-6, 4000)
        if run.memory.enabled:
            assert run.values_lr_of(run.memory) == 10 * run.optim.lr == 1e-3
            assert run.memory.key_dim == run.model.hidden_size // 2
            assert run.memory == replace(run.memory, heads=4, top_k=32) and run.table_dtype_of(run.memory) == "bf16"
        else:
            assert run.memory == MemoryConfig(enabled=False)
