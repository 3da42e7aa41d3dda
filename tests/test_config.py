"""A run's settings: their checks, overrides and YAML, the layout they give, and the learning-rate curve."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.overrides import known_keys, load_yaml, override, to_yaml
from mempar.runtime.placement import Placement, colocating_vpp, place, resolve, stage_of_layer
from mempar.runtime.schedule import lr_factor

MODEL = ModelConfig(num_layers=24, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96)
MEMORY = MemoryConfig(layers=(4, 12, 20), num_subkeys=8, heads=2, top_k=4, key_dim=8, column_tile=8)
BASE = RunConfig(model=MODEL, memory=MEMORY, train=TrainConfig(global_batch_size=48, seq_length=32))
EVERYTHING_SET = RunConfig(
    name="a: b # 3",
    model=ModelConfig(num_layers=6, num_query_groups=4, norm_epsilon=1e-7, init_std=0.1 + 0.2, tie_embeddings=True),
    memory=MemoryConfig(
        layers=(1, 3, 5),
        num_subkeys=64,
        lr=1e-30,
        weight_decay=0.0,
        qk_norm=True,
        optimizer="adamw",
        merge_duplicates="off",
    ),
    parallel=ParallelConfig(
        tp=2, pp=3, vpp=2, mp=6, mp_rows=3, mp_hops=2, sequence_parallel=True, distributed_optimizer=True
    ),
    optim=OptimConfig(lr=1 / 3, schedule="wsd", wsd_decay_steps=7, eps=5e-324, beta2=0.0),
    train=TrainConfig(steps=10**9, seed=2**40, dtype="bf16", peak_tflops=989.5),
    data=DataConfig(paths=("1", "null", "x/y z"), weights=(0.1, 2.0, 1e22), heldout_paths=("true",), cache="~/c"),
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_layers=0), r"model\.num_layers=0 "),
        (lambda: ModelConfig(hidden_size=-1), r"model\.hidden_size=-1 "),
        (lambda: ModelConfig(vocab_multiple=0), r"model\.vocab_multiple=0 "),
        (lambda: ModelConfig(vocab_size=-5), r"model\.vocab_size=-5 "),
        (lambda: ModelConfig(hidden_size=100, num_attention_heads=12), r"model\.hidden_size=100 .*heads=12"),
        (lambda: ModelConfig(num_query_groups=5), r"model\.num_attention_heads=12 .*model\.num_query_groups=5"),
        (lambda: ParallelConfig(tp=0), r"parallel\.tp=0 "),
        (lambda: ParallelConfig(mp=-2), r"parallel\.mp=-2 "),
        (lambda: ParallelConfig(mp_rows=-1), r"parallel\.mp_rows=-1 "),
        (lambda: ParallelConfig(vpp=2), r"parallel\.vpp=2 with parallel\.pp=1"),
        (lambda: ParallelConfig(sequence_parallel=True), r"sequence_parallel=true with parallel\.tp=1"),
        (lambda: ParallelConfig(mp=6, mp_rows=4), r"parallel\.mp_rows=4 .*parallel\.mp=6"),
        (lambda: ParallelConfig(mp_hops=3), r"parallel\.mp_hops=3 "),
        (lambda: ParallelConfig(mp=4, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=0, parallel\.mp=4.*mp_hops=1\."),
        (lambda: ParallelConfig(mp=4, mp_rows=4, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=4"),
        (lambda: ParallelConfig(mp=4, mp_rows=1, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=1"),
        (lambda: MemoryConfig(merge_duplicates="yes"), r"merge_duplicates=yes .*auto, on, off"),
        (lambda: OptimConfig(schedule="step"), r"optim\.schedule=step .*linear, cosine, wsd, constant"),
        (lambda: OptimConfig(lr=-0.1), r"optim\.lr=-0\.1 "),
        (lambda: OptimConfig(lr=math.nan), r"optim\.lr=nan "),
        (lambda: OptimConfig(clip_grad=math.inf), r"optim\.clip_grad=inf "),
        (lambda: OptimConfig(beta1=1.0), r"optim\.beta1=1\.0 "),
        (lambda: OptimConfig(beta2=-0.5), r"optim\.beta2=-0\.5 "),
        (lambda: OptimConfig(lr=0.001, min_lr=0.25), r"optim\.min_lr=0\.25 .*optim\.lr=0\.001"),
        (lambda: TrainConfig(dtype="fp16"), r"train\.dtype=fp16 .*float64, float32, bf16"),
        (lambda: TrainConfig(steps=-1), r"train\.steps=-1 "),
        (lambda: TrainConfig(log_interval=0), r"train\.log_interval=0 "),
        (lambda: TrainConfig(global_batch_size=6, micro_batch_size=8), r"micro_batch_size=8 .*global_batch_size=6"),
        (lambda: TrainConfig(recompute="some"), r"train\.recompute=some .*none, selective, full"),
        (
            lambda: TrainConfig(recompute="selective", recompute_modules=("mlp", "layernorm")),
            r"recompute_modules=\['mlp', 'layernorm'\] .*core_attn, mlp",
        ),
        (lambda: TrainConfig(recompute="selective", recompute_modules=()), r"recompute_modules=\[\] "),
        (lambda: DataConfig(paths=("a", "b"), weights=(1.0,)), r"data\.weights has 1 numbers for 2 data\.paths"),
        (lambda: DataConfig(paths=("a", "b"), weights=(1.0, 0.0)), r"data\.weights=\[1\.0, 0\.0\]"),
        (lambda: DataConfig(paths=("a",), weights=(math.nan,)), r"data\.weights=\[nan\]"),
        (lambda: MemoryConfig(usage_interval=-5), r"memory\.usage_interval=-5 "),
        (lambda: RunConfig(memory=MemoryConfig()), r"memory\.layers is empty"),
        (lambda: replace(BASE, memory=replace(MEMORY, layers=(4, 24))), r"\[4, 24\] .*blocks 0 to 23"),
        (lambda: replace(BASE, memory=replace(MEMORY, layers=(-1, 4))), r"\[-1, 4\] .*blocks 0 to 23"),
        (
            lambda: replace(BASE, memory=replace(MEMORY, variant="memory", value_dim=32)),
            r"memory\.value_dim=32 .*model\.hidden_size=64",
        ),
        (
            lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(2,), variant="peer", value_dim=32),)),
            r"memory1\.value_dim=32 .*model\.hidden_size=64.*`peer`",
        ),
        (lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(5, 12)),)), r"blocks \[12\] belong to several"),
        (lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(24,)),)), r"memory1\.layers=\[24\] .*0 to 23"),
        (lambda: replace(BASE, more_memories=(MemoryConfig(enabled=False),)), r"more_memories .*enabled=false"),
        (lambda: BASE.with_parallel(pp=5), r"model\.num_layers=24 .*= 5 x 1"),
        (lambda: BASE.with_parallel(pp=4, vpp=4), r"model\.num_layers=24 .*= 4 x 4"),
        (lambda: BASE.with_parallel(tp=3), r"parallel\.tp=3 .*model\.num_attention_heads=4"),
        (lambda: replace(BASE.with_parallel(tp=2), model=replace(MODEL, num_query_groups=1)), r"tp=2 .*groups=1;"),
        (lambda: replace(BASE.with_parallel(tp=4), model=replace(MODEL, ffn_hidden_size=98)), r"tp=4 .*ffn.*=98;"),
        (lambda: replace(BASE.with_parallel(tp=4), model=replace(MODEL, vocab_multiple=10)), r"tp=4 .*multiple=10;"),
        (
            lambda: replace(BASE, train=TrainConfig(seq_length=33)).with_parallel(tp=2, sequence_parallel=True),
            r"parallel\.tp=2 .*train\.seq_length=33",
        ),
    ],
)
def test_config_refuses_with_the_numbers(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_run_config_derives_what_is_not_set() -> None:
    run = replace(BASE, optim=OptimConfig(lr=0.25, weight_decay=0.5))
    derived = (run.values_lr_of(MEMORY), run.values_weight_decay_of(MEMORY), run.value_dim_of(MEMORY))
    assert derived == (2.5, 0.5, 64)
    own = replace(MEMORY, lr=0.125, weight_decay=0.0, value_dim=16)
    assert (run.values_lr_of(own), run.values_weight_decay_of(own), run.value_dim_of(own)) == (0.125, 0.0, 16)
    runs = {dtype: replace(run, train=TrainConfig(dtype=dtype)) for dtype in ("float64", "bf16")}
    assert {dtype: run.value_bytes_of(MEMORY) for dtype, run in runs.items()} == {"float64": 8, "bf16": 2}
    assert ModelConfig(num_attention_heads=6, num_query_groups=0).query_groups == 6


@pytest.mark.parametrize(
    ("sizes", "world"),
    [({}, 1), ({"tp": 2, "mp": 3}, 6), ({"tp": 2, "pp": 2, "mp": 4}, 8), ({"tp": 4, "cp": 3, "pp": 2, "mp": 6}, 24)],
)
def test_smallest_world_is_the_first_that_can_be_placed(sizes: dict[str, int], world: int) -> None:
    assert ParallelConfig(**sizes).smallest_world == world
    run = BASE.with_parallel(**sizes)
    assert place(run, world).grid.world == world
    for smaller in range(1, world):
        with pytest.raises(ConfigError):
            place(run, smaller)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 10**4))
@example(257, 128)
@example(256, 128)
def test_padded_vocabulary_is_the_next_multiple(vocab_size: int, multiple: int) -> None:
    padded = ModelConfig(vocab_multiple=multiple).padded_vocab(vocab_size)
    assert padded % multiple == 0
    assert vocab_size <= padded < vocab_size + multiple
    assert ModelConfig(vocab_multiple=multiple, vocab_size=vocab_size).padded_vocab(3) == padded


def test_padded_vocabulary_does_not_depend_on_the_layout() -> None:
    sizes = [{}, {"tp": 2}, {"tp": 4, "sequence_parallel": True}, {"tp": 4, "pp": 2, "mp": 8}]
    assert {BASE.with_parallel(**size).model.padded_vocab(257) for size in sizes} == {384}


def test_override_sets_values_of_every_kind() -> None:
    assignments = ["train.steps=7", "memory.layers=[2,5]", "optim.lr=3e-5", "data.paths=[a,b]", "data.weights=[1,2.5]"]
    run = override(BASE, [*assignments, "memory.qk_norm=true", "name=two words", "train.steps=8"])
    assert (run.train.steps, run.memory.layers, run.optim.lr) == (8, (2, 5), 3e-5)
    assert (run.data.paths, run.data.weights, run.memory.qk_norm, run.name) == (
        ("a", "b"),
        (1.0, 2.5),
        True,
        "two words",
    )
    assert (run.model, run.train.seq_length) == (BASE.model, 32)
    assert override(BASE, []) == BASE
    # A later assignment replaces lists, and nothing after the sign is an empty text.
    assert override(run, ["memory.layers=[4]"]).memory.layers == (4,)
    assert override(replace(BASE, data=DataConfig(corpus="stdlib")), ["data.corpus="]).data.corpus == ""


def test_override_reaches_every_setting() -> None:
    keys = known_keys(BASE)
    assert len(set(keys)) == len(keys) > 60
    assert {"name", "train.steps", "parallel.mp_rows", "memory.num_subkeys", "optim.eps", "data.tokenizer"} <= set(keys)
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(BASE, section), name) if name else getattr(BASE, section)
        text = "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
        assert override(BASE, [f"{key}={text}"]) == BASE, key


@pytest.mark.parametrize(
    ("assignment", "near"),
    [
        ("train.stepps=3", "train.steps"),
        ("steps=3", "train.steps"),
        ("memory.num_subkey=3", "memory.num_subkeys"),
        ("optim.seed=3", "train.seed"),
        ("model.num_layers.x=3", "model.num_layers"),
        ("nonsense=3", "data, memory, model, moe, optim, parallel, train"),
    ],
)
def test_override_names_near_keys_when_key_is_unknown(assignment: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(BASE, [assignment])
    assert f"'{assignment.partition('=')[0]}' is not a setting" in str(caught.value)
    assert near in str(caught.value)


@pytest.mark.parametrize("assignment", ["train.steps", "=3", "", "train.steps: 3"])
def test_override_refuses_what_is_no_assignment(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"write KEY=VALUE"):
        override(BASE, [assignment])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps=many", r"train\.steps must be int"),
        ("train.steps=1.5", r"train\.steps must be int"),
        ("train.steps=true", r"train\.steps must be int"),
        ("train.steps=null", r"train\.steps must be int"),
        ("train.steps=", r"train\.steps must be int"),
        ("train.steps=[1]", r"train\.steps must be int"),
        ("train.steps={x: 1}", r"train\.steps must be int"),
        ("optim.lr=fast", r"optim\.lr must be float"),
        ("memory.qk_norm=perhaps", r"memory\.qk_norm must be bool"),
        ("memory.layers=5", r"memory\.layers must be tuple\[int"),
        ("memory.layers=[1.5]", r"memory\.layers must be tuple\[int"),
        ("data.paths=", r"data\.paths must be tuple\[str"),
        ("data.paths={a: 1}", r"data\.paths must be tuple\[str"),
        ("data.paths=[a", r"data\.paths"),
        ("train.dtype=???", r"train\.dtype"),
        ("name=a: b", r"name must be str"),
        ("train=5", r"'train' is a section"),
        ("train=null", r"'train' is a section"),
        ("model={num_layers: 2}", r"'model' is a section"),
    ],
)
def test_override_refuses_values_of_another_type(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(BASE, [assignment])


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_override_takes_on_and_off_as_written_where_a_text_is_meant(value: str) -> None:
    assert override(BASE, [f"memory.merge_duplicates={value}"]).memory.merge_duplicates == value
    assert override(BASE, ["memory.qk_norm=on", "name=no"]) == replace(
        BASE, name="no", memory=replace(MEMORY, qk_norm=True)
    )


def test_override_passes_on_the_checks_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp=3 .*model\.num_attention_heads=4"):
        override(BASE, ["parallel.tp=3"])
    with pytest.raises(ConfigError, match=r"memory\.layers=\[2, 1\]"):
        override(BASE, ["memory.layers=[2,1]"])


@pytest.mark.parametrize("run", [RunConfig(), BASE, EVERYTHING_SET], ids=["default", "base", "everything"])
def test_yaml_gives_back_the_same_run(tmp_path: Path, run: RunConfig) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(run))
    again = load_yaml(path)
    assert again == run
    assert hash(again) == hash(run)
    assert to_yaml(again) == to_yaml(run)


def test_yaml_may_hold_some_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 3}\nmodel:\n  num_layers: 2\n")
    assert load_yaml(path) == RunConfig(model=ModelConfig(num_layers=2), train=TrainConfig(steps=3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {steps: [}", r"cannot be read as YAML"),
        (b"\xff\xfe\x00", r"cannot be read as YAML"),
        (b"train: {steps: 1, steps: 2}", r"cannot be read as YAML"),
        (b"- train", r"holds no settings"),
        (b"5", r"5|int"),
        (b"trian: {steps: 1}", r"'trian' is not a setting"),
        (b"train: {stepz: 1}", r"'train\.stepz' is not a setting.*train\.steps"),
        (b"train: {steps: soon}", r"config\.yaml: train\.steps must be int"),
        (b"memory: {layers: [1.5]}", r"config\.yaml: memory\.layers must be tuple\[int"),
        (b"data: {paths: {a: 1}}", r"config\.yaml: data\.paths must be tuple\[str"),
        (b"memory: {merge_duplicates: on}", r"memory\.merge_duplicates must be str, but YAML reads on.*in quotes"),
        (b"train:", r"config\.yaml: train must be a section of settings"),
        (b"train: 5", r"config\.yaml: train must be a section of settings"),
        (b"train: ${nowhere}", r"train.*nowhere"),
    ],
)
def test_yaml_is_refused_when_malformed(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)


def test_yaml_is_refused_when_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_yaml(tmp_path)


def layouts(num_layers: int) -> list[tuple[int, int]]:
    """Every (p, v) of an interleaved pipeline of that many blocks."""
    return [(p, v) for p in range(2, num_layers + 1) for v in range(2, num_layers + 1) if num_layers % (p * v) == 0]


@pytest.mark.parametrize("num_layers", [24, 32])
def test_stage_of_layer_deals_out_chunks_in_turn(num_layers: int) -> None:
    for pp, vpp in [(1, 1), (2, 1), (num_layers, 1), *layouts(num_layers)]:
        chunk = num_layers // (pp * vpp)
        # Virtual stage after virtual stage, every pipeline stage takes the next blocks.
        stages = [stage for _ in range(vpp) for stage in range(pp) for _ in range(chunk)]
        assert [stage_of_layer(layer, num_layers=num_layers, pp=pp, vpp=vpp) for layer in range(num_layers)] == stages


@pytest.mark.parametrize(
    ("num_layers", "layers", "together"),
    [
        (24, (4, 12, 20), {(2, 3), (4, 3), (8, 3), (2, 6), (4, 6), (2, 12)}),
        (32, (8, 16, 24), {(2, 4), (4, 4), (8, 4), (2, 8), (4, 8), (2, 16)}),
        (32, (7, 15, 23), {(2, 4), (4, 4), (8, 4), (2, 8), (4, 8), (2, 16)}),
    ],
)
def test_memory_layers_share_a_stage_in_the_layouts_of_the_design(
    num_layers: int, layers: tuple[int, ...], together: set[tuple[int, int]]
) -> None:
    found = set()
    for pp, vpp in layouts(num_layers):
        stages = {stage_of_layer(layer, num_layers=num_layers, pp=pp, vpp=vpp) for layer in layers}
        run = RunConfig(
            model=replace(MODEL, num_layers=num_layers),
            memory=replace(MEMORY, layers=layers),
            parallel=ParallelConfig(pp=pp, vpp=vpp),
            train=TrainConfig(global_batch_size=pp, seq_length=32),
        )
        placement = place(run, pp)
        assert placement.table_stages == tuple(sorted(stages))
        if len(stages) == 1:
            found.add((pp, vpp))
            assert f"table on stage {min(stages)} of {pp}" in placement.reason
        else:
            assert f"stages {', '.join(map(str, sorted(stages)))}" in placement.reason
            assert f"pp={pp}, vpp={vpp}" in placement.reason
    assert found == together


def shards(placement: Placement) -> tuple[int, int]:
    plan = placement.memories["memory"].plan
    return plan.num_row_shards, plan.num_column_shards


def test_place_cuts_columns_or_rows_by_the_bytes_they_send() -> None:
    # 2 D b = 512 against (e + s) M = 96 bytes: columns; with 48 reads 576: rows.
    columns = place(BASE.with_parallel(mp=4), 4)
    assert shards(columns) == (1, 4)
    assert (columns.grid.mp_rows, columns.grid.mp_columns) == (1, 4)
    assert "4 column shards" in columns.reason and "D=64, M=8" in columns.reason
    many_reads = replace(BASE, memory=replace(MEMORY, heads=12))
    rows = place(many_reads.with_parallel(mp=4), 4)
    assert shards(rows) == (4, 1)
    assert "4 row shards" in rows.reason and "M=48" in rows.reason
    wide_tiles = replace(BASE, memory=replace(MEMORY, column_tile=32))
    rows = place(wide_tiles.with_parallel(mp=4), 4)
    assert shards(rows) == (4, 1)
    assert "only 2 column tiles" in rows.reason
    grid = place(BASE.with_parallel(mp=4, mp_rows=2), 8)
    assert (*shards(grid), grid.grid.dp) == (2, 2, 8)
    assert grid.reason.endswith("2 row x 2 column shards as set, one hop")
    two_hops = place(BASE.with_parallel(mp=4, mp_rows=2, mp_hops=2), 8)
    assert two_hops.grid.mp_hops == 2
    assert two_hops.reason.endswith("2 row x 2 column shards as set, two hops")
    plan = grid.memories["memory"].plan
    assert (plan.num_slots, plan.value_dim, plan.column_tile) == (64, 64, 8)


@pytest.mark.parametrize(
    ("sizes", "setting", "width", "merge", "words"),
    [
        # Three heads that read 4 of 16 slots each are expected to read 16 (1 - (3/4)^3) = 9.25 with 12 reads.
        ({"mp": 4, "mp_rows": 2}, "auto", 128, True, "; duplicate reads (23% expected) merged"),
        ({"mp": 4, "mp_rows": 2}, "auto", 64, False, ""),
        ({"mp": 4, "mp_rows": 1}, "auto", 128, False, ""),
        ({"mp": 4, "mp_rows": 1}, "on", 64, True, "; duplicate reads merged as set"),
        ({"mp": 4, "mp_rows": 2}, "off", 128, False, ""),
        ({"mp": 1}, "on", 128, False, ""),
    ],
)
def test_place_merges_duplicates_where_it_pays_or_is_asked_for(
    sizes: dict[str, int], setting: str, width: int, merge: bool, words: str
) -> None:
    memory = replace(MEMORY, num_subkeys=4, value_dim=width, merge_duplicates=setting, heads=3)
    (memory,) = place(replace(BASE, memory=memory).with_parallel(**sizes), 4).memories.values()
    assert memory.merge == merge
    assert ("merged" in memory.reason) == merge and memory.reason.endswith(words)


def test_place_of_a_dense_model_has_no_table() -> None:
    dense = replace(BASE, memory=MemoryConfig(enabled=False))
    placement = place(dense, 2)
    assert placement.memories == {} and placement.table_stages == ()
    with pytest.raises(ConfigError, match=r"parallel\.mp=2 with memory\.enabled=false"):
        place(dense.with_parallel(mp=2), 2)


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"tp": 2, "pp": 2}, 6, r"6 ranks .*tp=2 x cp=1 x pp=2 = 4"),
        ({"mp": 4}, 6, r"parallel\.mp=4 .*= 6 on 6 ranks"),
        ({"mp": 16, "mp_rows": 1}, 16, r"16 column shards .* 64 wide has 8 of memory\.column_tile=8"),
    ],
)
def test_place_refuses_what_does_not_divide(sizes: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(BASE.with_parallel(**sizes), world)


@pytest.mark.parametrize(
    ("sizes", "batch", "world", "padding"),
    [
        ({}, (48, 1), 6, 0),
        ({}, (48, 1), 5, 2),
        ({"tp": 2}, (48, 8), 8, 16),
        ({"pp": 4, "vpp": 3}, (48, 1), 32, 16),
        ({"pp": 4}, (48, 1), 32, 0),
    ],
)
def test_place_tells_the_padding(sizes: dict[str, int], batch: tuple[int, int], world: int, padding: int) -> None:
    train = TrainConfig(global_batch_size=batch[0], micro_batch_size=batch[1], seq_length=32)
    reason = place(replace(BASE, train=train).with_parallel(**sizes), world).reason
    assert ("padding a step" in reason) == bool(padding)
    assert not padding or f"; {padding} samples of padding a step" in reason


def curve(schedule: str, *, total: int = 100, **given: float) -> list[float]:
    optim = OptimConfig(lr=0.5, schedule=schedule, **given)
    return [lr_factor(optim, step, total) for step in range(total + 20)]


ALL_SCHEDULES = {"linear": {}, "cosine": {}, "wsd": {"wsd_decay_steps": 30}, "constant": {}}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_learning_rate_warms_up_then_only_falls(schedule: str, min_lr: float, warmup_steps: int) -> None:
    factors = curve(schedule, min_lr=min_lr, warmup_steps=warmup_steps, **ALL_SCHEDULES[schedule])
    assert factors[:warmup_steps] == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    falling = factors[warmup_steps:]
    assert falling[0] == 1.0
    assert falling == sorted(falling, reverse=True)
    end = 1.0 if schedule == "constant" else min_lr / 0.5
    assert falling[100 - warmup_steps :] == pytest.approx([end] * 20, abs=1e-12)
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_learning_rate_has_the_shape_of_its_schedule() -> None:
    given = {"min_lr": 0.05, "warmup_steps": 20}
    progress = [step / 80 for step in range(81)]
    linear, cosine = curve("linear", **given)[20:101], curve("cosine", **given)[20:101]
    assert linear == pytest.approx([0.1 + 0.9 * (1 - part) for part in progress])
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in progress])
    wsd = curve("wsd", wsd_decay_steps=30, **given)
    assert wsd[20:70] == [1.0] * 50
    assert wsd[70:100] == pytest.approx([1 - 0.9 * (step + 1) / 30 for step in range(30)])
    assert curve("constant", **given)[20:] == [1.0] * 100


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_learning_rate_ends_at_decay_steps_whatever_the_length_of_the_run(schedule: str) -> None:
    given = {"warmup_steps": 5, "decay_steps": 60, "min_lr": 0.05, **ALL_SCHEDULES[schedule]}
    short, long = curve(schedule, total=60, **given), curve(schedule, total=300, **given)
    assert long[:80] == short
    assert long[60:] == pytest.approx([1.0 if schedule == "constant" else 0.1] * 260)


def test_learning_rate_has_no_floor_when_lr_is_zero() -> None:
    assert lr_factor(OptimConfig(lr=0.0, schedule="linear"), 50, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("parallel", "world", "samples", "expected"),
    [
        ({}, 1, 24, 8),
        ({"mp": 4}, 4, 24, 6),
        ({"pp": 2}, 2, 24, 6),
        ({"pp": 2, "vpp": 2}, 4, 24, 3),
        ({"tp": 2}, 2, 24, 8),
        ({"mp": 24}, 24, 24, 1),
        # Padding that single samples need too: 5 = 3 + 2 over two ranks.
        ({}, 2, 5, 3),
        ({}, 1, 5, 5),
        ({"pp": 2}, 2, 3, 1),
    ],
)
def test_micro_batch_chosen_by_layout(parallel: dict[str, int], world: int, samples: int, expected: int) -> None:
    train = TrainConfig(global_batch_size=samples, micro_batch_size=0, seq_length=128)
    run = RunConfig(model=MODEL, memory=MEMORY, train=train, parallel=ParallelConfig(**parallel))
    resolved = resolve(run, world)
    assert resolved.train.micro_batch_size == expected
    place(resolved, world)


def test_micro_batch_and_virtual_stages_kept_when_set() -> None:
    run = RunConfig(model=MODEL, train=TrainConfig(global_batch_size=24, micro_batch_size=2))
    assert resolve(run, 1) is run


def test_more_memories_are_set_and_read_back(tmp_path: Path) -> None:
    run = override(BASE, ["more_memories=[{layers: [2], num_subkeys: 6, top_k: 3, variant: peer}]"])
    assert list(run.memories) == ["memory", "memory1"]
    second = run.memories["memory1"]
    assert (second.layers, second.num_slots, second.table_names) == ((2,), 36, ("values", "down"))
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert load_yaml(tmp_path / "run.yaml") == run
    with pytest.raises(ConfigError, match="more_memories"):
        override(BASE, ["more_memories=[{layres: [2]}]"])


def test_memories_are_placed_apart_on_one_grid() -> None:
    run = replace(BASE, more_memories=(replace(MEMORY, layers=(2, 3), num_subkeys=5, variant="peer"),))
    placement = place(run.with_parallel(pp=2, mp=2, mp_rows=2), 4)
    first, second = placement.memories.values()
    assert (first.stages, second.stages) == ((0, 1), (0,))
    assert (first.plan.num_slots, second.plan.num_slots) == (64, 25)
    assert placement.table_stages == (0, 1)
    assert "memory: a copy" in placement.reason and "memory1: table on stage 0" in placement.reason


@pytest.mark.parametrize(
    ("num_layers", "layers", "expected"),
    [
        # (4, 12, 20) of 24 never meet at p = 3, and (8, 16, 24) of 32 meet at multiples of four chunks a stage.
        (24, (4, 12, 20), {1: 1, 2: 3, 3: None, 4: 3, 6: None, 8: 3, 12: None}),
        (32, (8, 16, 24), {1: 1, 2: 4, 4: 4, 8: 4, 16: None}),
        (24, (4, 5), {2: 1, 4: 1, 12: 1, 24: None}),
        (24, (7,), {2: 1, 24: 1}),
    ],
)
def test_fewest_virtual_stages_that_put_the_table_on_one_stage(
    num_layers: int, layers: tuple[int, ...], expected: dict[int, int | None]
) -> None:
    assert {pp: colocating_vpp([layers], num_layers=num_layers, pp=pp) for pp in expected} == expected
    for pp, vpp in expected.items():
        run = RunConfig(
            model=replace(MODEL, num_layers=num_layers),
            memory=replace(MEMORY, layers=layers),
            parallel=ParallelConfig(pp=pp, vpp=0),
            train=TrainConfig(global_batch_size=2 * pp, seq_length=32),
        )
        resolved = resolve(run, pp)
        assert resolved == run.with_parallel(vpp=vpp or 1)
        placement = place(resolved, pp)
        assert (len(placement.table_stages) == 1) == (vpp is not None)
        if pp > 1:
            assert ("where all its layers lie" if vpp else "nor at any vpp") in placement.reason


def test_virtual_stages_are_not_chosen_at_the_price_of_padding() -> None:
    # Three micro-batches: interleaved over two stages they would be four.
    train = TrainConfig(global_batch_size=3, seq_length=32)
    run = replace(BASE, train=train).with_parallel(pp=2, vpp=0)
    resolved = resolve(run, 2)
    assert resolved.parallel.vpp == 1
    reason = place(resolved, 2).reason
    assert "a copy of the table on each of the stages 0, 1" in reason
    assert "they would at parallel.vpp=3, with 1 samples of padding" in reason
    even = resolve(replace(run, train=TrainConfig(global_batch_size=4, seq_length=32)), 2)
    assert even.parallel.vpp == 3
    dense = resolve(replace(run, memory=MemoryConfig(enabled=False)), 2)
    assert dense.parallel.vpp == 1
