"""Recipes by name, file and function; the list of them; the run that a command line means."""

from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.recipes import RECIPES, find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import override, to_yaml
from mempar.runtime.preflight import check_layout
from mempar.tools import recipe_list, train_command


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


def test_list_shows_every_recipe() -> None:
    table = recipe_list.show(None, as_json=False)
    assert all(name in table for name in RECIPES)


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
        train_command.with_data(run, print)
