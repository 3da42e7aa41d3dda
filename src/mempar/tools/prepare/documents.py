"""A segment as documents: lines, paragraphs, whole files, JSON lines, rows; and what is wrong with those that are not.

It runs in the workers, where parsing costs nothing to the process that reads.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.tools.prepare.segments import Segment

UNITS = ("file", "line", "paragraph")
_BLANK_LINES = re.compile(rb"\n(?:\r?\n)+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """Text to encode, or the reason why there is none.

    Attributes:
        line: where it begins, from 1; a row in Parquet files.
        text: the text.
        wrong: what is wrong with it, if anything.
        ends: it ends here, rather than with a later piece.
        whole: it also begins here.
    """

    line: int
    text: str = ""
    wrong: str = ""
    ends: bool = True
    whole: bool = True


def splitter(form: str, unit: str, field: str) -> Callable[[Segment], Iterator[Document]]:
    """Return the function that splits segments of a format.

    Args:
        form: text, jsonl or parquet.
        unit: what a document of a text file is: file, line or paragraph.
        field: key of the text in JSON lines.
    """
    if form == "jsonl":
        return lambda segment: _json_lines(segment, field)
    if form == "parquet":
        return _rows
    return {"file": _whole, "line": _lines, "paragraph": _paragraphs}[unit]


def check_unit(unit: str) -> None:
    """Refuse an unknown unit."""
    if unit not in UNITS:
        raise ConfigError(
            f"--documents {unit} is not known; a document of a text file is one of: {', '.join(UNITS)}; use one of "
            "these."
        )


def _whole(segment: Segment) -> Iterator[Document]:
    assert isinstance(segment.content, bytes)
    yield _decoded(segment.content, segment.line, ends=segment.ends, whole=segment.starts and segment.ends)


def _lines(segment: Segment) -> Iterator[Document]:
    assert isinstance(segment.content, bytes)
    for number, line in enumerate(segment.content.split(b"\n")):
        if line := line.removesuffix(b"\r"):
            yield _decoded(line, segment.line + number)


def _paragraphs(segment: Segment) -> Iterator[Document]:
    assert isinstance(segment.content, bytes)
    # Blank lines at the beginning separate nothing.
    content = segment.content.lstrip(b"\r\n")
    line = segment.line + segment.content[: len(segment.content) - len(content)].count(b"\n")
    start = 0
    for blank in [*_BLANK_LINES.finditer(content), None]:
        end = len(content) if blank is None else blank.start()
        paragraph = content[start:end]
        if text := paragraph.rstrip(b"\r\n"):
            yield _decoded(text, line)
        if blank is not None:
            line += paragraph.count(b"\n") + blank[0].count(b"\n")
            start = blank.end()


def _json_lines(segment: Segment, field: str) -> Iterator[Document]:
    assert isinstance(segment.content, bytes)
    for number, line in enumerate(segment.content.split(b"\n"), segment.line):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except UnicodeDecodeError as error:
            yield Document(line=number, wrong=f"invalid UTF-8 ({error.reason})")
            continue
        except (ValueError, RecursionError) as error:
            yield Document(line=number, wrong=f"no JSON ({error})")
            continue
        if not isinstance(found, dict) or field not in found:
            has = f"has {', '.join(list(found)[:5]) or 'nothing'}" if isinstance(found, dict) else "is no object"
            yield Document(line=number, wrong=f"no field {field}: it {has}")
        elif not isinstance(found[field], str):
            yield Document(line=number, wrong=f"field {field} holds {type(found[field]).__name__}, not a string")
        else:
            yield _checked(found[field], number)


def _rows(segment: Segment) -> Iterator[Document]:
    for number, text in enumerate(segment.content, segment.line):
        if isinstance(text, str):
            yield _checked(text, number)
        else:
            yield Document(line=number, wrong="null in place of text")


def _decoded(content: bytes, line: int, *, ends: bool = True, whole: bool = True) -> Document:
    try:
        return Document(line=line, text=content.decode(), ends=ends, whole=whole)
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        return Document(
            line=line, wrong=f"invalid UTF-8 (byte {content[error.start]:#04x}: {error.reason})", ends=ends, whole=whole
        )


def _checked(text: str, line: int) -> Document:
    """JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Document(line=line, wrong="half of a surrogate pair, which is no character")
    return Document(line=line, text=text)
