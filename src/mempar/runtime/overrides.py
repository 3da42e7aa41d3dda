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
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{assignment}' is no override; write KEY=VALUE, e.g. train.steps=100.")
        _check_key(config, key)
    return _merge(config, OmegaConf.from_dotlist(list(assignments)), "the overrides")


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
    return _merge(default, given, str(path))


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


def _check_key(config: RunConfig, key: str) -> None:
    keys = known_keys(config)
    sections = {known.partition(".")[0] for known in keys}
    if key in keys or key in sections:
        return
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    near += [known for known in keys if known.endswith(f".{last}") and known not in near]
    hint = f"did you mean {', '.join(near)}?" if near else f"keys start with {', '.join(sorted(sections))}."
    raise ConfigError(f"'{key}' is not a setting; every key must be known; {hint}")


def _merge(config: RunConfig, given: Any, source: str) -> RunConfig:
    schema = OmegaConf.structured(config)
    for node in (schema, *(schema[key] for key in schema)):
        # Frozen dataclasses come out read-only; the merged object is frozen again.
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, False)
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        kind = _expected_type(config, str(key))
        raise ConfigError(
            f"{key}: {_one_line(error)} ({source}); {key} must be {kind}; give a value of that type."
        ) from None
    assert isinstance(merged, RunConfig)
    return merged


def _expected_type(config: RunConfig, key: str) -> str:
    section, _, name = key.partition(".")
    settings = getattr(config, section, None)
    if dataclasses.is_dataclass(settings):
        for setting in dataclasses.fields(settings):
            if setting.name == name.partition("[")[0]:
                kind = setting.type
                return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return "a section of settings"


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
