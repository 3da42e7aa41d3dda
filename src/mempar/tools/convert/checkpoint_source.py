"""A checkpoint of mempar's as a source."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import MANIFEST, checksum, read_manifest
from mempar.runtime.checkpoint.reading import Reader
from mempar.tools.convert.source import RowStream


class CheckpointSource:
    """See `Source`."""

    has_digests = True

    def __init__(self, root: Path) -> None:
        """Read what describes a checkpoint.

        Raises:
            CheckpointError: when it is none, or damaged.
        """
        self.root = root
        self.manifest = read_manifest(root)
        self.run = read_config(self.manifest)
        self.identity = checksum((root / MANIFEST).read_bytes())
        self.tensors = self.manifest.tensors
        self.progress, self.about = self.manifest.progress, self.manifest.about
        self._reader = Reader(self.manifest)

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        self._reader.read(box, target)

    @contextmanager
    def stream(self, name: str, first: int, last: int) -> Iterator[RowStream]:
        """See `Source`."""
        yield _Rows(self, name, first)

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        return [0, self.tensors[name].shape[0]]

    def memory_bytes(self, name: str) -> int:
        """See `Source`."""
        return 2 * max(piece.num_bytes for _, piece in self.manifest.pieces_of(name))


class _Rows:
    def __init__(self, source: CheckpointSource, name: str, first: int) -> None:
        self.source, self.name, self.at = source, name, first

    def read(self, target: Tensor) -> None:
        record = self.source.tensors[self.name]
        whole = Box(
            name=self.name,
            dtype=record.dtype,
            shape=record.shape,
            offset=(0,) * len(record.shape),
            sizes=record.shape,
        )
        rows = len(target)
        offset = (self.at, *whole.offset[1:])
        self.source.read(replace(whole, offset=offset, sizes=(rows, *record.shape[1:])), target)
        self.at += rows
