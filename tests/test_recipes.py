"""Recipes by name, file and function; the list of them; the run that a command line means."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.recipes import RECIPES, TWINS, find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import load_yaml, override, to_yaml
from mempar.runtime.preflight import check_layout
from mempar.tools import recipe_list, run_start


def make_recipe() -> RunConfig:
    return RunConfig(name="mine")


def test_recipes_are_found_by_name_file_and_function(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(make_recipe()))
    assert find_recipe(str(path)) == find_recipe("test_recipes:make_recipe") == make_recipe()
    with pytest.raises(ConfigError, match="returns PosixPath"):
        find_recipe("test_recipes:Path")
    with pytest.raises(ConfigError, match="did you mean smoke"):
        find_recipe("smok")


def test_near_names_of_recipes_and_twins_are_told() -> None:
    with pytest.raises(ConfigError, match="did you mean 8b_dense_128xh100_bf16, "):
        find_recipe("8b_dense_128xa100_bf16")
    with pytest.raises(ConfigError, match="_64m_64xh200_bf16_tiny"):
        find_recipe("1.3b_memory_plus_64m_64xh200_tiny")


def test_list_shows_every_recipe_on_a_line() -> None:
    table = recipe_list.show(None, as_json=False)
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(RECIPES)
    largest = next(line for line in table.splitlines() if "8b_memory_plus_16m" in line)
    assert all(
        part in largest for part in ("76.52B", "7.805B", "68.72B", "1T", "128 h100", "tp4", "mp128=8x16", "dp32")
    )
    with_twins = recipe_list.show(None, as_json=False, tiny=True)
    assert [line.split()[0] for line in with_twins.splitlines()[2:]] == [*RECIPES, *TWINS]


def test_list_as_json_has_sizes_hardware_and_layout() -> None:
    rows = {row["name"]: row for row in json.loads(recipe_list.show(None, as_json=True))}
    assert list(rows) == list(RECIPES)
    assert rows["smoke"]["hardware"] == "cpu" and rows["smoke"]["gpus"] == 1
    row = rows["1.3b_memory_plus_64m_64xh200_bf16"]
    assert (row["memory_params"], row["gpus"], row["hardware"]) == (2**37, 64, "h200")
    assert row["total_params"] > row["memory_params"] > row["active_params"] and row["flops_per_token"] > 8e9
    assert row["layout"]["mp"] == row["layout"]["mp_rows"] * row["layout"]["mp_columns"] == 64
    assert row["tokens"] == pytest.approx(1e12, rel=1e-3)


@pytest.mark.parametrize("name", [*RECIPES, *list(TWINS)[-2:]])
def test_printed_config_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    printed = recipe_list.show(name, as_json=False)
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    assert load_yaml(path) == find_recipe(name)
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert comments[0].startswith(f"# {name}: ") and " active" in comments[0]
    assert not any("not known" in line for line in comments)


def test_printed_config_says_sizes_tokens_layout_and_data() -> None:
    said = "\n".join(recipe_list.comments(find_recipe("1.3b_memory_plus_16m_64xh100_bf16")))
    assert "35.62B parameters, 34.36B of them in tables; 1.259B active" in said
    assert "1T tokens in 119210 steps of 8.389M" in said
    assert "64 h100: mp64=8x8 in two hops dp64; table on the only stage" in said
    assert "data: 67.0% data/llama2/fineweb from HuggingFaceFW/fineweb (ODC-By" in said


def test_what_cannot_be_told_of_a_config_is_said_and_it_is_printed(tmp_path: Path) -> None:
    run = override(find_recipe("smoke"), ["parallel.tp=2", "hardware.gpu=h100", "hardware.gpus=3"])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))
    printed = recipe_list.show(str(path), as_json=False)
    assert "# not known: 3 ranks do not divide into tp=2" in printed
    path.write_text(printed)
    assert load_yaml(path) == run


def test_sizes_are_known_without_the_tokenizer_and_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mempar.runtime.data.encoders.load_encoder", lambda spec: pytest.fail(f"loaded {spec}"))
    assert len(json.loads(recipe_list.show(None, as_json=True))) == len(RECIPES)
    assert not os.listdir(tmp_path)


def test_a_run_keeps_the_name_of_its_recipe() -> None:
    for name in [*RECIPES, *TWINS]:
        assert find_recipe(name) == replace(find_recipe(name), name=name)


@pytest.mark.parametrize(
    "layout",
    [
        "tp=2", "tp=2 sequence_parallel=true", "pp=2", "pp=2 vpp=2", "mp=2 mp_rows=2", "mp=2 mp_rows=1",
        "mp=3 mp_rows=1", "mp=3 mp_rows=3", "mp=4 mp_rows=1",
        "mp=4 mp_rows=4", "mp=4 mp_rows=2", "mp=6 mp_rows=1", "mp=6 mp_rows=3",
        "tp=2 mp=2", "tp=2 mp=4", "pp=2 mp=2", "tp=2 pp=2 mp=4", "tp=2 distributed_optimizer=true",
    ],
)  # fmt: skip
def test_smoke_divides_over_many_layouts(layout: str) -> None:
    run = override(find_recipe("smoke"), [f"parallel.{size}" for size in layout.split()])
    check_layout(run, run.parallel.smallest_world)


def test_data_of_an_unknown_corpus_is_refused() -> None:
    run = override(find_recipe("smoke"), ["data.corpus=wiki"])
    with pytest.raises(ConfigError, match="built-in corpora are: stdlib"):
        run_start.with_data(run, print)
