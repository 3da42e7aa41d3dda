"""`KEY=VALUE` overrides and YAML files, merged into a RunConfig with every name and type checked."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig

# What YAML reads as true or false, and what is meant as written where a text is asked for.
_TRUTH_VALUES = ("on", "off", "yes", "no", "true", "false")


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the config with `section.key=value` assignments applied.

    Raises:
        ConfigError: for an unknown key (near names are listed), a wrong type, or a value that the
            config's own checks refuse.
    """
    schema = _open_schema(config)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{assignment}' is no override; write KEY=VALUE, e.g. train.steps=100.")
        _check_key(config, key)
        if key in _sections(config):
            raise ConfigError(f"'{key}' is a section; an override sets one value; write {key}.NAME=VALUE.")
        # An empty value is an empty text, not YAML's null.
        text = assignment if value else f'{key}=""'
        if _type_of(config, key) == "str" and value.lower() in _TRUTH_VALUES:
            text = f'{key}="{value}"'
        _set(schema, lambda text=text: OmegaConf.from_dotlist([text]), key, f"'{assignment}'", config)
    return _freeze(schema)


def load_yaml(path: Path) -> RunConfig:
    """Read a run's config from a YAML file such as the `config.yaml` of a run's directory.

    The file may come with a checkpoint of unknown origin, so values are taken as they are written: `${...}`, which
    would read the environment or other settings, is refused, in recipes too. Only overrides may hold it.

    Raises:
        ConfigError: when the file is missing, is no mapping of known settings, or holds an interpolation.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a recipe or an existing YAML file.") from None
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{path}: {where} cannot be read ({_one_line(error)}); write plain values.") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({_one_line(error)}); mend the file.") from None
    return from_mapping(given, path)


def from_mapping(given: Any, path: Path) -> RunConfig:
    """Make a run's config of plain values, sections by name and settings by name in them; see `load_yaml`.

    Args:
        given: the values.
        path: the file that they come from.

    Raises:
        ConfigError: when they are no mapping of known settings, or hold an interpolation.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no settings; a config is a mapping of sections; see `mempar recipes NAME`.")
    _refuse_interpolations(given, "", path)
    default = RunConfig()
    schema = _open_schema(default)
    for section, settings in ((str(name), settings) for name, settings in given.items()):
        _check_key(default, section)
        if section not in _sections(default):
            _set(schema, lambda s=section, v=settings: OmegaConf.create({s: v}), section, str(path), default)
            continue
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {section} must be a section of settings; write {section}: {{NAME: VALUE}}.")
        for name, value in settings.items():
            key = f"{section}.{name}"
            _check_key(default, key)
            if _type_of(default, key) == "str" and isinstance(value, bool):
                raise ConfigError(
                    f"{path}: {key} must be str, but YAML reads on, off, yes and no as true or false; put it in quotes."
                )
            nested = {section: {name: value}}
            _set(schema, lambda nested=nested: OmegaConf.create(nested), key, str(path), default)
    return _freeze(schema)


def _refuse_interpolations(value: Any, key: str, path: Path) -> None:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            _refuse_interpolations(item, f"{key}.{name}" if key else str(name), path)
    # OmegaConf takes every text with these two characters for an interpolation.
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{path}: {key} is {value!r}; a file's values are taken as they are written, and ${{...}} is read nowhere; "
            "write the value itself, or give it as KEY=VALUE."
        )


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML, in the order of its definition."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The whole config as plain values, for JSON."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return plain


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


def _set(schema: DictConfig, parse: Callable[[], Any], key: str, source: str, config: RunConfig) -> None:
    """Set one key in place; whatever is wrong with its value is said in terms of that key."""
    try:
        given = parse()
        if OmegaConf.missing_keys(given):
            raise ValueError("??? stands for a missing value")
        if key == "more_memories":
            given = OmegaConf.create({key: [_memory(item) for item in given[key]]})
        schema.merge_with(given)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError):
        raise ConfigError(f"{source}: {key} must be {_type_of(config, key)}; give a value of that type.") from None


def _memory(settings: Any) -> DictConfig:
    """One of `more_memories`, with every name and type checked; OmegaConf does not look into tuples."""
    schema = OmegaConf.structured(MemoryConfig())
    OmegaConf.set_readonly(schema, False)
    schema.merge_with(settings)
    return schema


def _freeze(schema: DictConfig) -> RunConfig:
    frozen = OmegaConf.to_object(schema)
    assert isinstance(frozen, RunConfig)
    return frozen


def _type_of(config: RunConfig, key: str) -> str:
    section, _, name = key.partition(".")
    owner: Any = getattr(config, section) if name else config
    kind = next(field.type for field in dataclasses.fields(owner) if field.name == (name or section))
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
