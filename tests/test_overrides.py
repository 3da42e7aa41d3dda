"""Settings given as text: on the command line and in YAML."""

from dataclasses import replace
from pathlib import Path

import pytest

from config_samples import BASE, MEMORY
from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.overrides import known_keys, load_yaml, override, to_yaml

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
        ("nonsense=3", "data, hardware, kernels, memory, model, moe, optim, parallel, train"),
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


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("name: ${oc.env:MEMPAR_SECRET}", "name"),
        ('data: {tokenizer: "\\x24{oc.env:MEMPAR_SECRET}"}', r"data\.tokenizer"),
        ("data: {paths: [a, 'b/${oc.env:MEMPAR_SECRET}']}", r"data\.paths\.1"),
        ("more_memories: [{optimizer: '${oc.env:MEMPAR_SECRET}'}]", r"more_memories\.0\.optimizer"),
        ("train: {steps: '${train.seed}'}", r"train\.steps"),
        ("name: '${oc.env:MEMPAR_SECRET'", "name"),
    ],
)
def test_yaml_is_refused_when_it_would_read_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, key: str
) -> None:
    monkeypatch.setenv("MEMPAR_SECRET", "hush")
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {key} ") as failure:
        load_yaml(path)
    assert "hush" not in str(failure.value)
    # Whose words the overrides are is known.
    assert override(BASE, ["name=${oc.env:MEMPAR_SECRET}"]).name == "hush"


def test_yaml_is_refused_when_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_yaml(tmp_path)


def test_more_memories_are_set_and_read_back(tmp_path: Path) -> None:
    run = override(BASE, ["more_memories=[{layers: [2], num_subkeys: 6, top_k: 3, variant: peer}]"])
    assert list(run.memories) == ["memory", "memory1"]
    second = run.memories["memory1"]
    assert (second.layers, second.num_slots, second.table_names) == ((2,), 36, ("values", "down"))
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert load_yaml(tmp_path / "run.yaml") == run
    with pytest.raises(ConfigError, match="more_memories"):
        override(BASE, ["more_memories=[{layres: [2]}]"])
