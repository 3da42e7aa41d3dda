"""A checkpoint of mempar's as a source: every piece is read whole, and checked, before a number of it is used."""

import bisect
import io
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mempar.runtime.checkpoint import torch_dist
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.boxes import Box, whole_box
from mempar.runtime.checkpoint.manifest import MANIFEST, Piece, TensorRecord, checksum, damaged, read_manifest
from mempar.runtime.checkpoint.reading import Reader
from mempar.runtime.checkpoint.shard_file import SUFFIX
from mempar.tools.convert.source import MegatronState, RowStream

# Of megatron's that are no tensors, all together.
_MOST_OBJECT_BYTES = 1 << 28
_COMMON = f"{torch_dist.DIRECTORY}/common.pt"


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
        self.tensors: Mapping[str, TensorRecord] = self.manifest.tensors
        self.progress, self.about = self.manifest.progress, self.manifest.about
        self._reader = Reader(self.manifest)
        self._cuts: dict[str, list[int]] = {}

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        self._reader.read(box, target)

    @contextmanager
    def stream(self, name: str, first: int, last: int) -> Iterator[RowStream]:
        """See `Source`."""
        yield _Rows(self, name, first)

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        if name not in self._cuts:
            self._cuts[name] = self._find_cuts(name)
        return self._cuts[name]

    def _find_cuts(self, name: str) -> list[int]:
        spans = sorted(_rows_of(piece) for _, piece in self.manifest.pieces_of(name))
        cuts, end = [0], 0
        for start, stop in spans:
            # Where no piece goes on.
            if start == end and start > cuts[-1]:
                cuts.append(start)
            end = max(end, stop)
        return [*cuts, end] if end > cuts[-1] else cuts

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """See `Source`."""
        pieces = self.manifest.pieces_of(name)
        record, cuts = self.tensors[name], self.cuts(name)
        rows = max((stop - start for start, stop in itertools.pairwise(cuts)), default=0)
        kept = 0 if at_cuts else rows * prod(record.shape[1:]) * getattr(torch, record.dtype).itemsize
        # What torch.save wrote is there as it was read, as torch's loader sees it and as a tensor.
        return kept + max((piece.num_bytes * (1 if path.endswith(SUFFIX) else 3) for path, piece in pieces), default=0)

    def megatron(self) -> MegatronState:
        """See `Source`; nothing is unpickled but numbers, texts and tensors."""
        places = [(path, piece) for path, piece in self.manifest.pieces() if piece.key]
        if sum(piece.num_bytes for _, piece in places) > _MOST_OBJECT_BYTES:
            raise damaged(self.root / MANIFEST, f"it names more than {_MOST_OBJECT_BYTES} bytes that are no tensors")
        objects = {piece.key: self._reader.read_bytes(path, piece) for path, piece in places}
        common: dict = {}
        if _COMMON in self.manifest.files:
            data = b"".join(self._reader.read_bytes(_COMMON, piece) for piece in self.manifest.files[_COMMON].pieces)
            try:
                torch_dist.check_stored(data)
                common = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                if not isinstance(common, dict):
                    raise TypeError(f"a {type(common).__name__}")
            except Exception as error:
                raise damaged(self.root / _COMMON, f"it cannot be read ({type(error).__name__})") from None
        return MegatronState(common=common, objects=objects)


class _Rows:
    """Rows in order: pieces that go across what is asked for are read once, and what they hold kept until it is."""

    def __init__(self, source: CheckpointSource, name: str, first: int) -> None:
        self._source, self._at = source, first
        record = source.tensors[name]
        self._whole = whole_box(name, record.dtype, record.shape)
        self._cuts = source.cuts(name)
        self._kept, self._kept_first = torch.empty(0), 0

    def read(self, target: Tensor) -> None:
        done = 0
        while done < len(target):
            place = bisect.bisect_right(self._cuts, self._at)
            start, stop = self._cuts[place - 1], self._cuts[place]
            count = min(stop - self._at, len(target) - done)
            part = target[done : done + count]
            if start == self._at and count == stop - start:
                self._read(start, part)
            else:
                self._keep(start, stop)
                part.copy_(self._kept[self._at - start : self._at - start + count])
            self._at, done = self._at + count, done + count

    def _keep(self, start: int, stop: int) -> None:
        if len(self._kept) and self._kept_first == start:
            return
        self._kept = torch.empty(0)
        dtype = getattr(torch, self._whole.dtype)
        self._kept, self._kept_first = torch.empty((stop - start, *self._whole.shape[1:]), dtype=dtype), start
        self._read(start, self._kept)

    def _read(self, start: int, target: Tensor) -> None:
        offset, sizes = (start, *self._whole.offset[1:]), tuple(target.shape)
        self._source.read(replace(self._whole, offset=offset, sizes=sizes), target)


def _rows_of(piece: Piece) -> tuple[int, int]:
    assert piece.box is not None
    if not piece.box.shape:
        return 0, 1
    return piece.box.offset[0], piece.box.offset[0] + piece.box.sizes[0]
