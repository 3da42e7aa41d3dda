"""Reading: files as batches of about a megabyte of text, in order.

A batch ends where a document ends, save that a text file which is one long document is cut into pieces, each encoded
by itself. Pieces end at the first line end after `PIECE_BYTES` bytes that a letter or digit follows: tokenizers
that split text at line ends, as byte-pair encodings do, find the same tokens as in the whole. With every batch
comes the place where reading goes on, so that an interrupted command continues there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.tools.prepare.inputs import Input
from mempar.tools.prepare.parquet import parquet_segments
from mempar.tools.prepare.segments import Position, Segment
from mempar.tools.prepare.streams import Bytes, open_bytes

BATCH_BYTES = 1 << 20
PIECE_BYTES = 1 << 20
# A piece's end is looked for in so many bytes.
_WINDOW_BYTES = 1 << 16
# A document that is encoded in one go: tokenizer libraries take about a hundred bytes a token.
MAX_DOCUMENT_BYTES = 1 << 28
# Letters and digits of ASCII, and lead bytes of UTF-8 in whose ranges there are no spaces.
_GOOD_END = re.compile(rb"\n(?=[A-Za-z0-9\xc3-\xdf\xe4-\xed])")
_BLANK_LINE = re.compile(rb"\n(?:\r?\n)+")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Segments that are encoded together, of half of `BATCH_BYTES` at least but for the last.

    Attributes:
        segments: in order.
        after: where reading goes on after them.
        num_bytes_read: of the input files, as they lie on disk, up to here.
    """

    segments: tuple[Segment, ...]
    after: Position
    num_bytes_read: int


def read_batches(inputs: list[Input], start: Position, *, unit: str, field: str) -> Iterator[Batch]:
    """Read all inputs from a position on.

    Args:
        inputs: the files.
        start: where to begin.
        unit: what a document of a text file is: file, line or paragraph.
        field: column of Parquet files that holds the text.

    Raises:
        ConfigError: for files that are damaged or not what they should be.
    """
    segments: list[Segment] = []
    num_bytes = 0
    done = sum(source.num_bytes for source in inputs[: start.file])
    for number in range(start.file, len(inputs)):
        here = start if number == start.file else Position(file=number)
        source = inputs[number]
        reader = parquet_segments(source, here, field) if source.form == "parquet" else _text(source, here, unit)
        for segment, after, num_bytes_read in reader:
            segments.append(segment)
            num_bytes += segment.num_bytes
            if num_bytes >= BATCH_BYTES // 2:
                yield Batch(segments=tuple(segments), after=after, num_bytes_read=done + num_bytes_read)
                segments, num_bytes = [], 0
        done += source.num_bytes
        if segments and (num_bytes >= BATCH_BYTES // 2 or number == len(inputs) - 1):
            yield Batch(segments=tuple(segments), after=Position(file=number + 1), num_bytes_read=done)
            segments, num_bytes = [], 0


def _text(source: Input, here: Position, unit: str) -> Iterator[tuple[Segment, Position, int]]:
    """Segments of a text or JSONL file."""
    whole = source.form == "text" and unit == "file"
    paragraphs = source.form == "text" and unit == "paragraph"
    with open_bytes(source) as stream:
        stream.skip(here.offset)
        offset, line = here.offset, here.line
        pieces = _pieces(stream) if whole else _runs(stream, source, here, _BLANK_LINE if paragraphs else None)
        for content, last in pieces:
            segment = Segment(
                path=str(source.path),
                form=source.form,
                line=line,
                content=content,
                starts=not (whole and offset),
                ends=last,
            )
            offset += len(content)
            line += content.count(b"\n")
            after = Position(file=here.file + 1) if last and whole else Position(here.file, offset, line)
            yield segment, after, stream.num_bytes_read


def _pieces(stream: Bytes) -> Iterator[tuple[bytes, bool]]:
    """Pieces of one document, and whether each is the last; where they are cut depends on the text alone."""
    buffer = b""
    while True:
        wanted = PIECE_BYTES + _WINDOW_BYTES
        buffer += stream.read(wanted - len(buffer))
        if len(buffer) < wanted:
            # Nothing is left where the last cut was at the very end; the document has to end all the same.
            yield buffer, True
            return
        end = _piece_end(buffer)
        yield buffer[:end], False
        buffer = buffer[end:]


def _piece_end(buffer: bytes) -> int:
    good = _GOOD_END.search(buffer, PIECE_BYTES) or re.compile(rb"\n").search(buffer, PIECE_BYTES)
    if good:
        return good.end()
    # No line ends in the window: between two characters, then.
    return next((place for place in range(PIECE_BYTES, PIECE_BYTES + 4) if buffer[place] & 0xC0 != 0x80), PIECE_BYTES)


def _runs(
    stream: Bytes, source: Input, here: Position, separator: re.Pattern[bytes] | None
) -> Iterator[tuple[bytes, bool]]:
    """Whole lines, or whole paragraphs; each run is complete in itself."""
    buffer = b""
    while True:
        block = stream.read(BATCH_BYTES)
        if len(block) < BATCH_BYTES:
            if buffer or block:
                yield buffer + block, True
            return
        buffer += block
        end = buffer.rfind(b"\n") + 1
        if separator is not None:
            end = max((found.end() for found in separator.finditer(buffer)), default=0)
            # The rest of a blank line may be in the next block.
            end = 0 if end == len(buffer) and len(buffer) < MAX_DOCUMENT_BYTES else end
        if end:
            yield buffer[:end], True
            buffer = buffer[end:]
        elif len(buffer) > MAX_DOCUMENT_BYTES:
            raise ConfigError(
                f"{source.path} has a {'line' if separator is None else 'paragraph'} of more than "
                f"{MAX_DOCUMENT_BYTES >> 20} MiB after line {here.line}; such a document is encoded in one go; cut it, "
                "or choose other --documents."
            )
