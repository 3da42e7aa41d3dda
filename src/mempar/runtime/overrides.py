"""`KEY=VALUE` overrides and YAML files, merged into a RunConfig with every name and type checked."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the config with `section.key=value` assignments applied.

    Raises:
        ConfigError: for an unknown key (near names are listed), a wrong type, or a value that the
            config's own checks refuse.
    """
    merged = _open_schema(config)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{assignment}' is no override; write KEY=VALUE, e.g. train.steps=100.")
        _check_key(config, key)
        if key in _sections(config):
            raise ConfigError(f"'{key}' is a section; an override sets one value; write {key}.NAME=VALUE.")
        # An empty value is an empty text, not YAML's null.
        given = OmegaConf.from_dotlist([assignment if value else f'{key}=""'])
        merged = _merge(merged, given, f"'{assignment}'", config, key)
    return _freeze(merged, config, "the overrides")


def load_yaml(path: Path) -> RunConfig:
    """Read a run's config from a YAML file such as the `config.yaml` of a run's directory."""
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a recipe or an existing YAML file.") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({_one_line(error)}); mend the file.") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path} holds no settings; a config is a mapping of sections; see `mempar recipes NAME`.")
    default = RunConfig()
    for section, settings in given.items():
        _check_key(default, str(section))
        if isinstance(settings, DictConfig):
            for key in settings:
                _check_key(default, f"{section}.{key}")
    return _freeze(_merge(_open_schema(default), given, str(path), default), default, str(path))


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML, in the order of its definition."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def known_keys(config: RunConfig) -> list[str]:
    """Every key that can be overridden."""
    keys = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            keys += [f"{section.name}.{setting.name}" for setting in dataclasses.fields(value)]
        else:
            keys.append(section.name)
    return keys


def _sections(config: RunConfig) -> list[str]:
    fields = dataclasses.fields(config)
    return [field.name for field in fields if dataclasses.is_dataclass(getattr(config, field.name))]


def _check_key(config: RunConfig, key: str) -> None:
    keys, sections = known_keys(config), _sections(config)
    if key in keys or key in sections:
        return
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    near += [known for known in keys if known.endswith(f".{last}") and known not in near]
    hint = f"did you mean {', '.join(near)}?" if near else f"keys start with {', '.join(sorted(sections))}."
    raise ConfigError(f"'{key}' is not a setting; every key must be known; {hint}")


def _open_schema(config: RunConfig) -> DictConfig:
    """The config as OmegaConf sees it, writable: frozen dataclasses come out read-only."""
    schema = OmegaConf.structured(config)
    for node in (schema, *(schema[section] for section in _sections(config))):
        OmegaConf.set_readonly(node, False)
    return schema


def _merge(into: DictConfig, given: Any, source: str, config: RunConfig, key: str = "") -> DictConfig:
    try:
        merged = OmegaConf.merge(into, given)
    except OmegaConfBaseException as error:
        raise _type_error(error, source, config, key) from None
    assert isinstance(merged, DictConfig)
    return merged


def _freeze(merged: DictConfig, config: RunConfig, source: str) -> RunConfig:
    try:
        frozen = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _type_error(error, source, config, "") from None
    assert isinstance(frozen, RunConfig)
    return frozen


def _type_error(error: OmegaConfBaseException, source: str, config: RunConfig, key: str) -> ConfigError:
    key = key or str(getattr(error, "full_key", None) or "a setting")
    section, _, name = key.partition(".")
    settings: Any = getattr(config, section, None)
    kind: Any = "a section of settings"
    if name and section in _sections(config):
        kind = next(field.type for field in dataclasses.fields(settings) if field.name == name.partition("[")[0])
    named = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return ConfigError(f"{source}: {key} must be {named}; give a value of that type.")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
