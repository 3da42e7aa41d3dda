"""Recipes: functions that return a RunConfig, by name.

A recipe is data: sizes, schedules, data mixes and layouts, nothing that runs. Every recipe NAME has a twin NAME_tiny
of the same structure for the machine at hand (see tiny.py).
"""

import difflib
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mempar.errors import ConfigError
from mempar.recipes.published import PUBLISHED
from mempar.recipes.smoke import smoke
from mempar.recipes.tiny import SUFFIX, tiny
from mempar.runtime.config import RunConfig
from mempar.runtime.overrides import load_yaml

RECIPES: dict[str, Callable[[], RunConfig]] = {"smoke": smoke, **PUBLISHED}


def _twin(recipe: Callable[[], RunConfig]) -> RunConfig:
    return tiny(recipe())


TWINS: dict[str, Callable[[], RunConfig]] = {name + SUFFIX: partial(_twin, recipe) for name, recipe in RECIPES.items()}


def find_recipe(name: str) -> RunConfig:
    """Return a run by recipe name, YAML file or `module:function`.

    Raises:
        ConfigError: when there is no such thing; near names are listed.
    """
    known = {**RECIPES, **TWINS}
    if name in known:
        return known[name]()
    if name.endswith((".yaml", ".yml")):
        return load_yaml(Path(name))
    if ":" in name:
        return _from_module(name)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"the recipes are: {', '.join(RECIPES)}."
    raise ConfigError(f"'{name}' is no recipe; give a recipe's name, a YAML file or module:function; {hint}")


def _from_module(name: str) -> RunConfig:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"'{name}' cannot be imported ({error}); write module:function of a recipe.") from None
    run = function() if callable(function) else function
    if not isinstance(run, RunConfig):
        raise ConfigError(f"'{name}' returns {type(run).__name__}; a recipe returns a mempar.runtime.config.RunConfig.")
    return run
