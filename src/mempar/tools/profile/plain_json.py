"""JSON of any origin into dataclasses: what does not fit ends in a ValueError that says what and where.

What is read here is added up, drawn and printed elsewhere: numbers have 64 bits, texts no control characters nor halves
of characters, and what may hold anything is not nested deeply.
"""

import dataclasses
import json
import types
from typing import Any, get_args, get_origin, get_type_hints

# Of integers and of floats: sums of many are finite, and any library takes them.
MOST = 2**63
DEEPEST = 32
# Of what is wrong, in a message.
_SHOWN_LETTERS = 40


def parse(text: str) -> Any:
    """Read JSON, which knows no NaN and no infinity.

    Raises:
        ValueError: when it is none.
        RecursionError: when it is nested too deeply for the parser.
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def read_dataclass(kind: type, data: Any, where: str) -> Any:
    """Make a dataclass of a JSON object that has exactly its fields, each of its type.

    Args:
        kind: the dataclass.
        data: the object.
        where: it stands, for messages.

    Raises:
        ValueError: when it does not fit.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {str(data)[:_SHOWN_LETTERS]!r}, not an object")
    hints = get_type_hints(kind)
    missing, unknown = hints.keys() - data.keys(), data.keys() - hints.keys()
    if missing or unknown:
        raise ValueError(f"{where} lacks {sorted(missing)} and has {sorted(unknown)} that do not belong there")
    return kind(**{name: checked(data[name], hint, f"{where}.{name}") for name, hint in hints.items()})


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return a value as its type wants it; integers pass for floats.

    Args:
        value: of JSON.
        hint: a dataclass, a plain type, a list or a dict of such, such or None, or Any.
        where: it stands, for messages.

    Raises:
        ValueError: when it does not fit.
    """
    if hint is Any:
        return _anything(value, where, 0)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return read_dataclass(hint, value, where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return None if value is None else checked(value, inner[0], where)
    if origin is list and isinstance(value, list):
        return [checked(each, inner[0], f"{where}[{place}]") for place, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {checked(key, str, where): checked(each, inner[1], f"{where}.{key}") for key, each in value.items()}
    if hint is float and type(value) is int and fits(value, int):
        return float(value)
    if not fits(value, hint):
        wanted = {int: "an integer of 64 bits", float: "a number below 2^63", str: "a text that can be printed"}
        raise ValueError(f"{where} is {str(value)[:_SHOWN_LETTERS]!r}, not {wanted.get(hint, hint)}")
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of its type, and can be counted with or printed."""
    if type(value) is not kind:
        return False
    if kind is str:
        return value.isprintable()
    return kind not in (int, float) or -MOST < value < MOST


def _anything(value: Any, where: str, depth: int) -> Any:
    """Check what may be any JSON of plain values that is not nested deeply."""
    if depth > DEEPEST:
        raise ValueError(f"{where[:_SHOWN_LETTERS]}... is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        return {checked(key, str, where): _anything(each, f"{where}.{key}", depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_anything(each, f"{where}[{place}]", depth + 1) for place, each in enumerate(value)]
    return checked(value, type(value), where)
