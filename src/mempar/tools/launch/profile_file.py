"""Reading a launch profile from YAML, and writing one.

YAML would take `24:00:00` for a number and `no` for a truth value: here every value is a text until the type of its
setting says otherwise.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from mempar.errors import ConfigError
from mempar.runtime.unique_names import UniqueNames
from mempar.tools.launch.profile import LaunchProfile, SlurmConfig, SshConfig

_SECTIONS = {"slurm": SlurmConfig, "ssh": SshConfig}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# What stands for no value, beside nothing at all.
_NOTHING = ("", "null", "~")
_WORDS = {str: "a text", int: "a whole number", bool: "true or false"}


class _TextLoader(UniqueNames, yaml.BaseLoader):
    """Scalars as they are written."""


def read_profile(path: Path) -> LaunchProfile:
    """Read a launch profile.

    Raises:
        ConfigError: when the file is missing, is no YAML, holds a name that is not known (near ones are listed) or a
            value that its setting does not take.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --profile names a launch profile in YAML; give its path.") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML ({what}); a launch profile is YAML; mend the file.") from None
    if given in (None, *_NOTHING):
        return LaunchProfile()
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no settings; a launch profile is a mapping of settings; write NAME: VALUE.")
    try:
        return _build(LaunchProfile, given, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def profile_yaml(profile: LaunchProfile) -> str:
    """The whole profile as YAML, in the order of its definition."""
    return yaml.safe_dump(dataclasses.asdict(profile), sort_keys=False, allow_unicode=True)


def known_names() -> list[str]:
    """Every setting of a profile, those of sections as `section.name`."""
    names = []
    for setting in dataclasses.fields(LaunchProfile):
        if setting.name in _SECTIONS:
            names += [f"{setting.name}.{inner.name}" for inner in dataclasses.fields(_SECTIONS[setting.name])]
        else:
            names.append(setting.name)
    return names


def _build(kind: type, given: dict[Any, Any], prefix: str) -> Any:
    """Make a dataclass of texts by name."""
    types_by_name = typing.get_type_hints(kind)
    values = {}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in types_by_name:
            raise _unknown(key)
        if name in _SECTIONS and not prefix:
            if value in _NOTHING:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{key} is a section of settings; write {key}: {{NAME: VALUE}}.")
            values[name] = _build(_SECTIONS[name], value, f"{name}.")
        elif value not in _NOTHING:
            values[name] = _typed(key, value, types_by_name[name])
    return kind(**values)


def _unknown(key: str) -> ConfigError:
    names = known_names()
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, [*names, *_SECTIONS], n=3, cutoff=0.6)
    near += [name for name in names if name.rpartition(".")[2] == last and name not in near]
    hint = f"did you mean {', '.join(near)}?" if near else f"the settings are {', '.join(names)}."
    return ConfigError(f"'{key}' is no setting of a launch profile; every name must be known; {hint}")


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Read a text, or texts, as what a setting takes."""
    if typing.get_origin(kind) is types.UnionType:
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{key} is a list of texts; write {key}: [VALUE, VALUE].")
        return tuple(value)
    if origin is dict:
        if not (isinstance(value, dict) and all(isinstance(item, str) for item in value.values())):
            raise ConfigError(f"{key} is a mapping of names to texts; write {key}: {{NAME: VALUE}}.")
        return value
    if isinstance(value, str):
        if kind is str:
            return value
        if kind is bool and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
        if kind is int and value.lstrip("+-").isdecimal():
            return int(value)
    raise ConfigError(f"{key} must be {_WORDS[kind]}, and {value!r} is none; give one.")
