"""Hardware descriptions by name or from a YAML file, every name and type checked, and written to one.

A file has the attributes of `Hardware`, one a line; `like: h200` takes what is not said from a known kind.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from mempar.errors import ConfigError
from mempar.runtime.hardware import GPUS, Hardware
from mempar.runtime.unique_names import UniqueNames

_LIKE = "like"


class _StrictLoader(UniqueNames, yaml.SafeLoader):
    """Values of the types that YAML knows."""


def find_hardware(name: str) -> Hardware:
    """Return a description by name, or read it from a YAML file.

    Raises:
        ConfigError: for a name that is none (near ones are listed), or a file that holds no description.
    """
    return load_hardware(Path(name)) if name.endswith((".yaml", ".yml")) else _known(name)


def _known(name: str) -> Hardware:
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"the known ones are {', '.join(GPUS)}."
    raise ConfigError(
        f"'{name}' is no known hardware; give a name, or a YAML file as `mempar plan --measure` writes; {hint}"
    )


def load_hardware(path: Path) -> Hardware:
    """Read a description.

    Raises:
        ConfigError: when the file is missing, is no YAML, or holds a name or a value that no description has.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; a description is a YAML file, or one of {', '.join(GPUS)}; give its path."
        ) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML ({what}); mend the file.") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no description of hardware; write NAME: VALUE, one a line.")
    try:
        return _from_mapping(given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def hardware_yaml(hardware: Hardware) -> str:
    """A description as YAML, in the order of its definition."""
    return yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False, allow_unicode=True, width=120)


def _from_mapping(given: dict[Any, Any]) -> Hardware:
    types = {field.name: field.type for field in dataclasses.fields(Hardware)}
    for name in given:
        if name not in types and name != _LIKE:
            near = difflib.get_close_matches(str(name), types, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else f"the names are {', '.join(types)}."
            raise ConfigError(f"'{name}' is no name of a hardware description; every name must be known; {hint}")
    values: dict[str, Any] = {}
    if _LIKE in given:
        values = dataclasses.asdict(_known(str(given[_LIKE])))
    values |= {name: _typed(name, value, types[name]) for name, value in given.items() if name != _LIKE}
    missing = [name for name in types if name not in values]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; a description says everything; add "
            f"what is missing, or `{_LIKE}: NAME` with NAME one of {', '.join(GPUS)}."
        )
    return Hardware(**values)


def _typed(name: str, value: Any, kind: Any) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    words = {str: "a text", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"{name}={value!r} must be {words}; correct {name}.")
