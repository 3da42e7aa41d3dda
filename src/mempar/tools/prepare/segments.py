"""What passes between reading, encoding and writing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A place in the inputs.

    Attributes:
        file: number of the file.
        offset: bytes of its text before it, or rows of a Parquet file.
        line: number of the line there, from 1.
    """

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of one file's documents, or a piece of a single one.

    Attributes:
        path: the file.
        form: its format.
        line: number of its first line, or row, from 1.
        content: bytes of text or JSON lines, or rows of a Parquet column.
        starts: a document begins here, rather than before.
        ends: a document ends here, rather than later.
    """

    path: str
    form: str
    line: int
    content: bytes | list[str | None]
    starts: bool = True
    ends: bool = True

    @property
    def num_bytes(self) -> int:
        """Size of the content, roughly."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(text or "") for text in self.content)
