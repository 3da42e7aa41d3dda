"""A tensor in a file as torch.save writes it, written and read in parts: the tensor may be larger than memory.

torch's files are zip archives whose members are stored as they are: a pickle that describes the object, and the numbers
of each tensor. Where everything lies follows from the description, so the numbers can be written in any order, and
what stands before and after them last: until then the file is no archive and nobody takes it for a whole one.
`TensorFile` lays such a file out; `open_tensor_file` finds its way in any that torch.save wrote, without unpickling
anything but tensors and without reading numbers.
"""

import io
import pickle
import stat
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from mempar.errors import CheckpointError

# The key under which universal checkpoints hold a file's tensor.
PARAM = "param"
# Numbers begin at a multiple of this, as torch writes them, so that a mapped file can be used as it is.
_ALIGNMENT = 64
# Sizes that do not fit into 32 bits stand in an extra field of a zip archive.
_LARGE = 0xFFFFFFFF
# Members that describe a file, and members of a file with one tensor, amply.
_LARGEST_DESCRIPTION_BYTES, _MOST_MEMBERS = 1 << 20, 16
_STORAGES = {
    "float64": torch.DoubleStorage,
    "float32": torch.FloatStorage,
    "bfloat16": torch.BFloat16Storage,
    "int64": torch.LongStorage,
    "int32": torch.IntStorage,
    "uint8": torch.ByteStorage,
}
# The first day that an archive can name.
_DATE = 1 << 5 | 1
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


class _Numbers:
    """Stands for a tensor's numbers in a pickle."""


class _Pickler(pickle.Pickler):
    """Writes `_Numbers` as torch's pickler writes a tensor."""

    def __init__(self, file: io.BytesIO, dtype: str, shape: tuple[int, ...]) -> None:
        super().__init__(file, protocol=2)
        self.storage = ("storage", _STORAGES[dtype], "0", "cpu", prod(shape))
        self.shape = shape

    def persistent_id(self, obj: Any) -> Any:
        return self.storage if obj is _Numbers else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Numbers):
            return NotImplemented
        strides = tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        # Its arguments: numbers, where they begin, shape, strides, whether a gradient is wanted, hooks.
        arguments = (_Numbers, 0, self.shape, strides, False, OrderedDict())
        return _rebuild_tensor_v2, arguments


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The file of one tensor, before its numbers are known.

    Attributes:
        dtype: of the numbers, as torch spells it.
        shape: of the tensor.
        extras: what else the file holds, by name; plain numbers.
    """

    dtype: str
    shape: tuple[int, ...]
    extras: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def start(self) -> int:
        """Where the numbers begin in the file."""
        return len(self.head(0))

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.start + self.num_bytes + len(self.tail(0))

    def head(self, crc: int) -> bytes:
        """What stands before the numbers, given their CRC-32."""
        return b"".join(_member(*member) for member in self._small) + self._numbers(crc)

    def tail(self, crc: int) -> bytes:
        """What stands after the numbers, given their CRC-32: the archive's directory."""
        directory, at = b"", 0
        for name, content in self._small:
            directory += _entry(name, zlib.crc32(content), len(content), at)
            at += len(_member(name, content))
        directory += _entry(_NUMBERS, crc, self.num_bytes, at)
        return directory + _end(len(self._small) + 1, len(directory), self.start + self.num_bytes)

    @cached_property
    def _small(self) -> list[tuple[str, bytes]]:
        """The members before the numbers."""
        buffer = io.BytesIO()
        _Pickler(buffer, self.dtype, self.shape).dump({**self.extras, PARAM: _Numbers()})
        # What torch's files say of themselves, in the order in which it writes that.
        return [
            ("archive/data.pkl", buffer.getvalue()),
            ("archive/.format_version", b"1"),
            ("archive/.storage_alignment", str(_ALIGNMENT).encode()),
            ("archive/byteorder", b"little"),
            ("archive/version", b"3\n"),
        ]

    def _numbers(self, crc: int) -> bytes:
        at = sum(len(_member(*member)) for member in self._small)
        sizes = struct.pack("<2H2Q", 1, 16, self.num_bytes, self.num_bytes)
        # A field whose content nobody reads fills the gap; it has 4 bytes itself.
        gap = -(at + _LOCAL.size + len(_NUMBERS) + len(sizes) + 4) % _ALIGNMENT
        extra = sizes + struct.pack("<2H", 0x4246, gap) + b"Z" * gap
        return _local(_NUMBERS, crc, _LARGE, len(extra)) + extra


_NUMBERS = "archive/data/0"


def _local(name: str, crc: int, size: int, extra_bytes: int) -> bytes:
    fields = (b"PK\3\4", 45, 0, 0, 0, _DATE, crc, size, size, len(name), extra_bytes)
    return _LOCAL.pack(*fields) + name.encode()


def _member(name: str, content: bytes) -> bytes:
    return _local(name, zlib.crc32(content), len(content), 0) + content


def _entry(name: str, crc: int, size: int, at: int) -> bytes:
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= _LARGE else b""
    shown = _LARGE if extra else size
    fields = (b"PK\1\2", 45, 45, 0, 0, 0, _DATE, crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, at)
    return _CENTRAL.pack(*fields) + name.encode() + extra


def _end(members: int, directory_bytes: int, at: int) -> bytes:
    end64 = b""
    if at >= _LARGE:
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, members, members, directory_bytes, at)
        end64 += _LOCATOR.pack(b"PK\6\7", 0, at + directory_bytes, 1)
    return end64 + _END.pack(b"PK\5\6", 0, 0, members, members, directory_bytes, min(at, _LARGE), 0)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a file holds its tensor.

    Attributes:
        path: the file.
        start: where the numbers begin.
        record_bytes: bytes that the archive's checksum is of; the tensor's are the first of them.
        crc: that checksum.
    """

    path: Path
    start: int
    record_bytes: int
    crc: int


def open_tensor_file(path: Path, dtype: str, shape: tuple[int, ...]) -> Stored:
    """Find the tensor in a file that torch.save or `TensorFile` wrote; no number is read.

    Args:
        path: the file.
        dtype: that it must have.
        shape: that it must have; it may be flat in the file.

    Raises:
        CheckpointError: when it is no such file.
    """
    try:
        members = _members(path)
        numbers = [info for name, info in members.items() if "/data/" in name]
        if len(numbers) != 1:
            raise ValueError(f"it holds {len(numbers)} tensors")
        tensor = _described(path)
        _check(tensor, dtype, shape, numbers[0].file_size)
        with path.open("rb") as file:
            file.seek(numbers[0].header_offset)
            head = _LOCAL.unpack(file.read(_LOCAL.size))
        start = numbers[0].header_offset + _LOCAL.size + head[9] + head[10]
        if head[0] != b"PK\3\4" or start + numbers[0].file_size > path.stat().st_size:
            raise ValueError("its directory does not fit its members")
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from None
    except Exception as error:
        # Whatever torch's and Python's readers of archives raise on bytes that are none.
        raise damaged(path, f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    return Stored(path=path, start=start, record_bytes=numbers[0].file_size, crc=numbers[0].CRC)


def load_object(path: Path) -> Any:
    """Load a small file that torch.save wrote, tensors and plain objects alone.

    Raises:
        CheckpointError: when it cannot be read or is not small.
    """
    try:
        members = _members(path)
        if sum(info.file_size for info in members.values()) > _LARGEST_DESCRIPTION_BYTES:
            raise ValueError(f"it has more than {_LARGEST_DESCRIPTION_BYTES} bytes")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise damaged(path, f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a plain file")
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    packed = [info.filename for info in infos if info.compress_type or info.compress_size != info.file_size]
    if packed or len(infos) > _MOST_MEMBERS or len({info.filename for info in infos}) < len(infos):
        raise ValueError("it is not an archive as torch.save writes it")
    if any(info.file_size > _LARGEST_DESCRIPTION_BYTES for info in infos if "/data/" not in info.filename):
        raise ValueError("what describes its tensor is too long")
    return {info.filename: info for info in infos}


def _described(path: Path) -> Tensor:
    # On the device meta tensors have no numbers: none are read, and no memory is taken.
    content = torch.load(path, map_location="meta", weights_only=True)
    tensor = content.get(PARAM) if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it holds no tensor named {PARAM}")
    return tensor


def _check(tensor: Tensor, dtype: str, shape: tuple[int, ...], record_bytes: int) -> None:
    flat = (prod(shape),)
    plain = tensor.is_contiguous() and tensor.storage_offset() == 0
    num_bytes = tensor.numel() * tensor.element_size()
    if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) not in (shape, flat):
        raise ValueError(f"it holds {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} belongs")
    if not plain or record_bytes < num_bytes:
        raise ValueError("its numbers are not stored one after the other")


def damaged(path: Path, why: str) -> CheckpointError:
    """What is said of a damaged file of a universal checkpoint."""
    return CheckpointError(
        f"{path} is damaged: {why}; a universal checkpoint is used whole or not at all; restore the file, or convert "
        "again."
    )
