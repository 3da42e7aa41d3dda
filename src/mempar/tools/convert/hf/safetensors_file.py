"""safetensors files: written at places that are known beforehand, in any order, and read a few rows at a time.

Eight bytes of length, a JSON header of names, types, shapes and places, then the numbers. Files may come from anywhere:
what a header says is checked before anything is believed of it. Reading maps nothing, so that a file that is cut short
meanwhile is an error and no fault of the process.
"""

import io
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.block_writer import as_bytes, write_at

SUFFIX = ".safetensors"
# Types of numbers that models are made of, as torch spells them.
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPE_NAMES = {name: type_name for type_name, name in _DTYPE_NAMES.items()}
# Numbers begin at a multiple of this, so that a mapped file can be used as it is.
_ALIGNMENT = 64
# Room for some hundred thousand tensors.
_LARGEST_HEADER_BYTES = 1 << 24
# Bytes read at a time where numbers are not taken as they lie.
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file: its type as torch spells it (or the file does, where no model has it), and its place."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return getattr(torch, self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """What a file holds and where.

    Attributes:
        path: of the file.
        entries: tensors by name.
        metadata: texts by name.
        header: its first bytes, up to the numbers.
        num_bytes: its size.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    header: bytes
    num_bytes: int


def lay_out(
    path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> FileLayout:
    """Say how a file of tensors (name, dtype, shape) looks; wide numbers come first, so that all are aligned.

    Raises:
        CheckpointError: for numbers of a type that no model is made of.
    """
    places, end = {}, 0
    metadata = {"format": "pt", **(metadata or {})}
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -_itemsize(path, *tensor[:2])):
        num_bytes = math.prod(shape) * _itemsize(path, name, dtype)
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": shape, "data_offsets": [end, end + num_bytes]}
        places[name] = (dtype, shape, end)
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    raw = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(dtype=dtype, shape=shape, start=len(raw) + start) for name, (dtype, shape, start) in places.items()
    }
    return FileLayout(path=path, entries=entries, metadata=metadata, header=raw, num_bytes=len(raw) + end)


def _itemsize(path: Path, name: str, dtype: str) -> int:
    if dtype not in _TYPE_NAMES:
        raise CheckpointError(
            f"{path.name} cannot hold {name}: its numbers are {dtype}; models there are made of "
            f"{', '.join(_TYPE_NAMES)}; leave it out, or cast it."
        )
    return getattr(torch, dtype).itemsize


@contextmanager
def writing(directory: Path, layout: FileLayout) -> Iterator[int]:
    """Begin a file anew, whatever is there, and bring it to the disk at the end.

    Yields:
        The file's descriptor; its header is written, its numbers are zeros.
    """
    with (directory / layout.path).open("wb", buffering=0) as file:
        file.truncate(layout.num_bytes)
        write_at(file.fileno(), layout.header, 0)
        yield file.fileno()
        os.fsync(file.fileno())


def write_numbers(file: int, entry: Entry, first_element: int, numbers: Tensor) -> int:
    """Write numbers into a tensor's place, from an element on; returns the bytes written."""
    data = as_bytes(numbers.contiguous())
    write_at(file, data, entry.start + first_element * entry.element_bytes)
    return len(data)


def open_plain(path: Path) -> io.FileIO:
    """Open a file for reading; a link is followed, and nothing is waited for.

    Raises:
        CheckpointError: when it is no plain file: a pipe would be waited for without end.
        OSError: when it cannot be opened.
    """
    file = io.FileIO(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise unreadable(path, "it is no plain file")
    return file


def read_layout(path: Path) -> FileLayout:
    """Read a file's header.

    Raises:
        CheckpointError: when the file is missing, cut short, or its header cannot be true.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER_BYTES):
                raise unreadable(path, f"its header has {length} bytes and the file {size}")
            header = file.read(length)
        described = json.loads(header)
        metadata = described.pop("__metadata__", {})
        entries = {name: _entry(entry, 8 + length, size) for name, entry in described.items()}
    except OSError as error:
        raise unreadable(path, error.strerror or type(error).__name__) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(path, f"its header is none ({type(error).__name__}: {error})") from None
    if not (isinstance(metadata, dict) and all(name.isprintable() for name in entries)):
        raise unreadable(path, "its header holds names that cannot be shown")
    raw = length.to_bytes(8, "little") + header
    return FileLayout(path=path, entries=entries, metadata=metadata, header=raw, num_bytes=size)


def _entry(described: dict[str, Any], begin: int, size: int) -> Entry:
    shape, (start, end) = tuple(described["shape"]), described["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{shape} at {start} to {end} are not sizes")
    dtype = str(described["dtype"])
    entry = Entry(dtype=_DTYPE_NAMES.get(dtype, dtype), shape=shape, start=begin + start)
    if not start <= end <= size - begin or (dtype in _DTYPE_NAMES and end - start != entry.num_bytes):
        raise ValueError(f"{dtype} {list(shape)} does not lie at {start} to {end} of {size - begin} bytes")
    return entry


def read_numbers(layout: FileLayout, name: str, first_element: int, target: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with a tensor's numbers, from an element on; they are cast to its type.

    Raises:
        CheckpointError: when the file has changed, or cannot be read.
    """
    entry, flat = layout.entries[name], target.view(-1)
    start = entry.start + first_element * entry.element_bytes
    try:
        with open_plain(layout.path) as file:
            if str(target.dtype) == f"torch.{entry.dtype}":
                _read_at(layout, file.fileno(), flat, start)
                return
            for part in flat.split(max(1, CHUNK_BYTES // entry.element_bytes)):
                as_stored = torch.empty(len(part), dtype=getattr(torch, entry.dtype))
                _read_at(layout, file.fileno(), as_stored, start)
                part.copy_(as_stored)
                start += as_stored.nbytes
    except OSError as error:
        raise unreadable(layout.path, error.strerror or type(error).__name__) from None


def _read_at(layout: FileLayout, file: int, target: Tensor, start: int) -> None:
    view = as_bytes(target)
    while len(view):
        count = os.preadv(file, [view], start)
        if not count:
            raise unreadable(layout.path, f"it ends at byte {start} of {layout.num_bytes}")
        view, start = view[count:], start + count


def unreadable(path: Path, why: str) -> CheckpointError:
    """What is said of a file that is not what it should be."""
    return CheckpointError(
        f"{path} cannot be read as a file of a model: {why}; a model is used whole or not at all; fetch or export it "
        "again."
    )
