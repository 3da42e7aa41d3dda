"""A stream of rows for sources that read any part of a tensor as easily as any other."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mempar.runtime.checkpoint.boxes import Box
from mempar.tools.convert.source import Source


class BoxRows:
    """See `RowStream`: rows from one on, each read as a box."""

    def __init__(self, source: Source, name: str, first: int) -> None:
        self.source, self.name, self.at = source, name, first

    def read(self, target: Tensor) -> None:
        """See `RowStream`."""
        record = self.source.tensors[self.name]
        box = Box(
            name=self.name,
            dtype=record.dtype,
            shape=record.shape,
            offset=(self.at,) + (0,) * (len(record.shape) - 1),
            sizes=(len(target), *record.shape[1:]),
        )
        self.source.read(box, target)
        self.at += len(target)


@contextmanager
def box_rows(source: Source, name: str, first: int) -> Iterator[BoxRows]:
    """A stream of a tensor's rows, as `Source.stream` gives it."""
    yield BoxRows(source, name, first)
