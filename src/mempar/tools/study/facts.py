"""Facts that every machine has: the Unicode character database, as Python's `unicodedata` carries it.

A fact has a subject and an answer: `U+1F4A9` and `PILE OF POO`. Characters that are named after their number or by a
rule (ideographs, Hangul syllables) are left out: there is nothing to remember. Names of blocks are fontTools', because
`unicodedata` has none.
"""

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from mempar.errors import ConfigError

NAME, CODE_POINT, CATEGORY, BLOCK, VALUE, DECOMPOSITION = KINDS = (
    "name",
    "code point",
    "category",
    "block",
    "numeric value",
    "decomposition",
)
_NUM_CODE_POINTS = 0x110000
# Decompositions into more characters are few, and longer than a document.
_MOST_PARTS = 4
# The database has fractions such as 1/320, which it hands out as floats.
_LARGEST_DENOMINATOR = 1000
_CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "other letter",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Me": "enclosing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "other number",
    "Pc": "connector punctuation",
    "Pd": "dash punctuation",
    "Ps": "opening punctuation",
    "Pe": "closing punctuation",
    "Pi": "initial quote punctuation",
    "Pf": "final quote punctuation",
    "Po": "other punctuation",
    "Sm": "mathematical symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "other symbol",
    "Zs": "space separator",
    "Zl": "line separator",
    "Zp": "paragraph separator",
    "Cf": "format control",
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something to be remembered.

    Attributes:
        kind: one of `KINDS`.
        subject: what the question gives; with the kind it makes a fact one of its own.
        answer: what is to be recalled.
    """

    kind: str
    subject: str
    answer: str


def draw_facts(number: int, seed: int) -> list[Fact]:
    """Choose facts; the same for the same number, seed and Unicode version.

    Characters come in random order. Each brings its name, its numeric value and decomposition if it has one, and, in
    turn, its code point (asked by name), its category or its block.

    Args:
        number: how many.
        seed: of the order.

    Raises:
        ConfigError: when there are not so many.
    """
    code_points = list(_named_characters())
    random.Random(f"facts {seed}").shuffle(code_points)
    facts: list[Fact] = []
    for place, code_point in enumerate(code_points):
        facts += _facts_of(code_point, (CODE_POINT, CATEGORY, BLOCK)[place % 3])
        if len(facts) >= number:
            return facts[:number]
    raise ConfigError(
        f"{number:,} facts are more than the {len(facts):,} that Unicode {unicodedata.unidata_version} has for this "
        "study; every fact is told of a character of its own name; ask for fewer."
    )


def sources() -> dict[str, str]:
    """What the facts depend on, by name: they differ between versions of Python and fontTools."""
    from importlib import metadata

    return {"unicode": unicodedata.unidata_version, "fonttools": metadata.version("fonttools")}


def _named_characters() -> Iterator[int]:
    for code_point in range(_NUM_CODE_POINTS):
        name = unicodedata.name(chr(code_point), "")
        if name and not name.endswith(f"-{code_point:04X}") and not name.startswith("HANGUL SYLLABLE "):
            yield code_point


def _facts_of(code_point: int, chosen: str) -> Iterator[Fact]:
    character, place = chr(code_point), _written(code_point)
    name = unicodedata.name(character)
    yield Fact(kind=NAME, subject=place, answer=name)
    match chosen:
        case "code point":
            yield Fact(kind=CODE_POINT, subject=name, answer=place)
        case "category":
            yield Fact(kind=CATEGORY, subject=place, answer=_CATEGORIES[unicodedata.category(character)])
        case "block":
            yield Fact(kind=BLOCK, subject=place, answer=_block_names()(character))
    value = unicodedata.numeric(character, None)
    if value is not None:
        fraction = Fraction(value).limit_denominator(_LARGEST_DENOMINATOR)
        yield Fact(kind=VALUE, subject=place, answer=str(fraction))
    parts = unicodedata.decomposition(character).split()
    if 0 < len(parts) <= _MOST_PARTS:
        yield Fact(kind=DECOMPOSITION, subject=place, answer=" ".join(map(_part, parts)))


def _part(part: str) -> str:
    """A part of a decomposition: its kind, as in `<compat>`, or a code point."""
    return part.strip("<>") if part.startswith("<") else _written(int(part, 16))


def _written(code_point: int) -> str:
    return f"U+{code_point:04X}"


@cache
def _block_names():
    try:
        from fontTools.unicodedata import block
    except ImportError:
        raise ConfigError(
            "the study needs the package `fonttools`, which is not installed and knows the names of Unicode's blocks; "
            "it comes with an extra; pip install 'mempar[study]'."
        ) from None
    return block
