"""A universal checkpoint as a source: one that a conversion of ours wrote, or that a DeepSpeed run continued.

Files that are as a conversion wrote them are read block by block, each block checked before a number of it is used.
Files that DeepSpeed wrote have one checksum each, in their archive's directory: such a file is checked whole when
something of it is read first.
"""

import bisect
import io
import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.block_writer import as_bytes
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import checksum
from mempar.tools.convert.deepspeed.crc import combined
from mempar.tools.convert.deepspeed.description import Blocks, read_description
from mempar.tools.convert.deepspeed.files import LATEST
from mempar.tools.convert.deepspeed.places import ZERO, Place, place_of
from mempar.tools.convert.deepspeed.tensor_file import Stored, damaged, load_object, open_tensor_file
from mempar.tools.convert.source import RowStream

# Bytes read at a time where they are only checked, and rows together in files without blocks of ours.
_CHUNK_BYTES = 1 << 23
_LONGEST_NAME = 255
# Of whole numbers that a float tells apart; neither infinity nor what is no number is below.
_MOST_UPDATES = 1 << 53


@dataclass(kw_only=True)
class _File:
    """A file with a tensor, and the checksums that its blocks should have.

    Attributes:
        stored: where the numbers are.
        dtype: of the numbers.
        shape: of the tensor.
        blocks: of the file; without checksums where it has been written anew.
        checked: whether the file's own checksum has been compared, or need not be.
    """

    stored: Stored
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Blocks
    checked: bool
    lock: Any = field(default_factory=threading.Lock)

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, index: int) -> Tensor:
        """Read a block: whole rows."""
        if not self.checked:
            with self.lock:
                self._check()
        start, stop = self.blocks.cuts[index : index + 2]
        numbers = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        data = as_bytes(numbers)
        with _opened(self.stored.path) as file:
            file.seek(self.stored.start + start * self.row_bytes)
            done = 0
            while done < len(data) and (count := file.readinto(data[done:])):
                done += count
        if done < len(data) or (self.blocks.crcs and zlib.crc32(data) != self.blocks.crcs[index]):
            raise damaged(self.stored.path, f"the checksum of rows {start} to {stop} is not that of what was written")
        return numbers

    def _check(self) -> None:
        """Compare the whole with the file's own checksum."""
        if self.checked:
            return
        left, crc = self.stored.record_bytes, 0
        with _opened(self.stored.path) as file:
            file.seek(self.stored.start)
            while left and (data := file.read(min(left, _CHUNK_BYTES))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != self.stored.crc:
            raise damaged(self.stored.path, "its checksum is not that of what was written")
        self.checked = True


@contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from None


class DeepSpeedSource:
    """See `Source`."""

    def __init__(self, root: Path) -> None:
        """Read what describes a universal checkpoint, and find its tensors.

        Args:
            root: what DeepSpeed is told to load, with `latest_universal` in it, or the folder that that names.

        Raises:
            CheckpointError: when it is none that a conversion of ours began, or damaged.
        """
        self.root = _folder(root)
        described = read_description(self.root)
        self.run, self.tensors, self.about = described.run, described.tensors, described.about
        self._places = {name: place_of(name, self.tensors) for name in self.tensors}
        self._files: dict[str, _File] = {}
        for name, place in self._places.items():
            if place.path not in self._files:
                self._files[place.path] = self._open(place, self.tensors[name].shape, described.blocks)
        self.progress = self._progress(described.progress)
        untouched = all(file.blocks.crcs for file in self._files.values()) and self.progress == described.progress
        self.has_digests = described.has_digests and untouched
        crcs = {path: file.stored.crc for path, file in sorted(self._files.items())}
        self.identity = checksum(json.dumps([self.progress, self.about, crcs, sorted(self.tensors)]).encode())

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        file = self._file_of(box)
        if not box.shape:
            target.copy_(file.read(0).view(()))
            return
        first, last = box.offset[0], box.offset[0] + box.sizes[0]
        inner = tuple(slice(at, at + size) for at, size in zip(box.offset[1:], box.sizes[1:], strict=True))
        for index, start, stop in _overlapping(file.blocks.cuts, first, last):
            at = file.blocks.cuts[index]
            target[start - first : stop - first].copy_(file.read(index)[(slice(start - at, stop - at), *inner)])

    @contextmanager
    def stream(self, name: str, first: int, last: int) -> Iterator[RowStream]:
        """See `Source`."""
        yield _Rows(self._files[self._places[name].path], first, last)

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        return self._files[self._places[name].path].blocks.cuts

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """See `Source`."""
        file = self._files[self._places[name].path]
        rows = max((stop - start for start, stop in pairwise(file.blocks.cuts)), default=0)
        # A block, and the next one while it is read.
        return 2 * rows * file.row_bytes + (0 if file.checked else _CHUNK_BYTES)

    def megatron(self) -> None:
        """See `Source`: DeepSpeed is not megatron."""

    def _open(self, place: Place, shape: tuple[int, ...], blocks: dict[str, Blocks]) -> _File:
        path = self.root / place.path
        for part in path.parents[: len(PurePosixPath(place.path).parts) - 1]:
            if part.is_symlink():
                raise damaged(path, "a directory on its way is a symbolic link")
        stored = open_tensor_file(path, place.dtype, shape)
        dtype = getattr(torch, place.dtype)
        rows = shape[0] if shape else 1
        row_bytes = prod(shape[1:]) * dtype.itemsize
        ours = blocks.get(place.path)
        if ours is not None and ours.cuts[-1] == rows:
            sizes = [(stop - start) * row_bytes for start, stop in pairwise(ours.cuts)]
            if combined(zip(ours.crcs, sizes, strict=True)) == stored.crc:
                shape = shape or (1,)
                return _File(stored=stored, dtype=dtype, shape=shape, blocks=ours, checked=True)
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        cuts = Blocks(cuts=[*range(0, rows, step), rows], crcs=[])
        return _File(stored=stored, dtype=dtype, shape=shape or (1,), blocks=cuts, checked=False)

    def _progress(self, described: dict[str, Any]) -> dict[str, Any]:
        """How far the run was, with the steps that DeepSpeed went on."""
        paths = {f"{ZERO}/{place.parameter}/step.pt" for place in self._places.values() if place.parameter is not None}
        found = {path: load_object(self.root / path) for path in sorted(paths) if (self.root / path).exists()}
        steps = {path: _whole_number(self.root / path, value) for path, value in found.items()}
        if not steps:
            return described
        (path, step), *others = steps.items()
        other = next((item for item in others if item[1] != step), None)
        if other is not None:
            raise CheckpointError(
                f"{self.root / path} says {step} updates and {self.root / other[0]} {other[1]}; all parameters are "
                "updated alike; use a checkpoint whose parameters are from one moment."
            )
        more = step - described["applied_steps"]
        if not more:
            return described
        return {**described, "step": described["step"] + more, "applied_steps": step, "losses": []}

    def _file_of(self, box: Box) -> _File:
        record = self.tensors.get(box.name)
        if record is None or (record.shape, record.dtype) != (box.shape, box.dtype):
            held = "nothing of this name" if record is None else f"{record.dtype} {list(record.shape)}"
            raise CheckpointError(
                f"{self.root} does not hold {box.name} as {box.dtype} {list(box.shape)}, but {held}; a checkpoint is "
                "continued by a run of the same model and precision; use its settings."
            )
        return self._files[self._places[box.name].path]


class _Rows:
    def __init__(self, file: _File, first: int, last: int) -> None:
        self.file, self.at, self.last = file, first, last
        self.held: tuple[int, Tensor] | None = None

    def read(self, target: Tensor) -> None:
        first, last = self.at, self.at + len(target)
        for index, start, stop in _overlapping(self.file.blocks.cuts, first, last):
            if self.held is None or self.held[0] != index:
                self.held = index, self.file.read(index)
            at = self.file.blocks.cuts[index]
            # Rounds where the tensor is kept in fewer bits than in the file.
            target[start - first : stop - first].copy_(self.held[1][start - at : stop - at])
        self.at = last


def _overlapping(cuts: list[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Blocks that hold some of the rows, each with the first and the last row of them."""
    index = bisect.bisect_right(cuts, first) - 1
    while first < last:
        stop = min(last, cuts[index + 1])
        yield index, first, stop
        first, index = stop, index + 1


def is_universal(root: Path) -> bool:
    """Whether a directory looks like a universal checkpoint, ours or another one."""
    return (root / LATEST).is_file() or (root / ZERO).is_dir()


def _folder(root: Path) -> Path:
    latest = root / LATEST
    if not latest.is_file():
        return root
    try:
        with latest.open("rb") as file:
            name = file.read(_LONGEST_NAME + 1).decode().strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    plain = name.isprintable() and len(name) <= _LONGEST_NAME and PurePosixPath(name).name == name
    if not plain or name in ("", ".", ".."):
        raise damaged(latest, "it does not name a folder beside it")
    return root / name


def _whole_number(path: Path, value: Any) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < _MOST_UPDATES or value != int(value):
        raise damaged(path, "it holds no number of updates")
    return int(value)
