"""Reading parts of logical tensors from a checkpoint of any layout, every piece checked before it is used."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.block_writer import as_bytes
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import DTYPE_BYTES, Manifest, Piece, check_file, checksum, damaged, not_read
from mempar.runtime.checkpoint.names import stored_name

# Bytes read at a time where they are only compared.
_CHUNK_BYTES = 1 << 23
# Of anything that is no tensor.
_LARGEST_OBJECT_BYTES = 1 << 28
# What torch.save adds to a tensor's numbers, amply.
_TORCH_SAVE_BYTES = 1 << 14


class Buffer:
    """Memory for one tensor after another: what is given back after every piece, allocators keep some of."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that is not filled, good until the next one."""
        num_bytes = prod(sizes) * dtype.itemsize
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(sizes)


class _OwnBuffer(threading.local):
    """A buffer of each thread's own."""

    def __init__(self) -> None:
        self.buffer = Buffer()


class Reader:
    """Reads from one checkpoint; only pieces that overlap what is asked for, and those whole."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.bytes_read = 0
        self._checked: set[str] = set()
        self._own = _OwnBuffer()

    def read(self, box: Box, target: Tensor) -> None:
        """Fill a tensor with a part of a logical tensor.

        Args:
            box: the part; its name may be any under which the checkpoint holds the same (see names.py).
            target: of the part's sizes, on any device, overwritten.

        Raises:
            CheckpointError: when the checkpoint does not hold it, or a piece is damaged.
        """
        name = stored_name(box.name, self.manifest.tensors)
        check_held(self.manifest, replace(box, name=name))
        missing = box.num_elements
        for path, piece in self.manifest.pieces_of(name):
            assert piece.box is not None
            places = box.overlap(piece.box)
            if places is None:
                continue
            mine, theirs = places
            view = target[mine]
            if path.endswith(shard_file.SUFFIX) and view.shape == piece.box.sizes and _is_plain(view):
                # The numbers are on disk as they are in memory.
                self._check_size(path, piece)
                self._read_bytes(path, piece, as_bytes(view))
            else:
                view.copy_(self.read_piece(path, piece, self._own.buffer)[theirs])
            missing -= view.numel()
        if missing:
            raise damaged(self.manifest.root, f"{missing} elements of {name} are in none of its files")

    def read_piece(self, path: str, piece: Piece, buffer: Buffer | None = None) -> Tensor:
        """Read one piece of a tensor, whole.

        Args:
            path: of its file.
            piece: what to read.
            buffer: where a shard's numbers may lie until it is used again.

        Raises:
            CheckpointError: when it is damaged.
        """
        assert piece.box is not None
        self._check_size(path, piece)
        try:
            if path.endswith(shard_file.SUFFIX):
                tensor = (buffer or Buffer()).empty(piece.box.sizes, shard_file.dtype_of(piece.box))
                self._read_bytes(path, piece, as_bytes(tensor)[: piece.num_bytes])
            else:
                data = bytearray(piece.num_bytes)
                self._read_bytes(path, piece, memoryview(data))
                tensor = torch_dist.load_piece(data)
        except CheckpointError:
            raise
        except Exception as error:
            raise damaged(self._path(path), f"{_place(piece)} cannot be read ({type(error).__name__})") from None
        if tensor.shape != piece.box.sizes or str(tensor.dtype) != f"torch.{piece.box.dtype}":
            raise damaged(self._path(path), f"{_place(piece)} is {tensor.dtype} {list(tensor.shape)}")
        return tensor

    def check_piece(self, path: str, piece: Piece) -> None:
        """Compare a piece with its checksum, a few MB at a time.

        Raises:
            CheckpointError: when it is damaged.
        """
        stream = xxhash.xxh3_128()
        chunk = memoryview(bytearray(min(piece.num_bytes, _CHUNK_BYTES)))
        done = 0
        with self._open(path, piece) as file:
            while done < piece.num_bytes and (count := file.readinto(chunk[: piece.num_bytes - done])):
                stream.update(chunk[:count])
                done += count
        self.bytes_read += done
        if done < piece.num_bytes or stream.hexdigest() != piece.checksum:
            raise self._changed(path, piece)

    def read_bytes(self, path: str, piece: Piece) -> bytes:
        """Read a small piece that is no tensor.

        Raises:
            CheckpointError: when it is damaged, or not small.
        """
        if piece.num_bytes > _LARGEST_OBJECT_BYTES:
            raise damaged(self._path(path), f"{_place(piece)} are more than {_LARGEST_OBJECT_BYTES} and no tensor")
        data = bytearray(piece.num_bytes)
        self._read_bytes(path, piece, memoryview(data))
        return bytes(data)

    def _read_bytes(self, path: str, piece: Piece, into: memoryview) -> None:
        done = 0
        with self._open(path, piece) as file:
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
        self.bytes_read += done
        if done < len(into) or checksum(into) != piece.checksum:
            raise self._changed(path, piece)

    @contextmanager
    def _open(self, path: str, piece: Piece) -> Iterator[io.FileIO]:
        if path not in self._checked:
            check_file(self.manifest.root, self.manifest.files[path])
            self._checked.add(path)
        try:
            with self._path(path).open("rb", buffering=0) as file:
                file.seek(piece.start)
                yield file
        except OSError as error:
            raise not_read(self._path(path), error, _place(piece)) from None

    def _check_size(self, path: str, piece: Piece) -> None:
        """Refuse a piece that is longer than what it holds before there is room made for it."""
        assert piece.box is not None
        exact = path.endswith(shard_file.SUFFIX)
        taken = piece.box.num_elements * DTYPE_BYTES[piece.box.dtype]
        if not taken <= piece.num_bytes <= taken + (0 if exact else _TORCH_SAVE_BYTES):
            raise damaged(
                self._path(path), f"{_place(piece)} has {piece.num_bytes} bytes, not the {taken} that its numbers take"
            )

    def _changed(self, path: str, piece: Piece) -> CheckpointError:
        return damaged(self._path(path), f"the checksum of {_place(piece)} is not that of what was written")

    def _path(self, path: str) -> Path:
        return self.manifest.root / path


def check_held(manifest: Manifest, box: Box) -> None:
    """Check that a checkpoint has a tensor of a part's name, whole shape and type.

    Raises:
        CheckpointError: when it has none, or another one.
    """
    record = manifest.tensors.get(box.name)
    if record is None or record.shape != box.shape or record.dtype != box.dtype:
        held = "nothing of this name" if record is None else f"{record.dtype} {list(record.shape)}"
        raise CheckpointError(
            f"{manifest.root} does not hold {box.name} as {box.dtype} {list(box.shape)}, but {held}; a checkpoint is "
            "continued by a run of the same model and precision; use its settings."
        )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def _place(piece: Piece) -> str:
    if piece.box is None:
        return f"bytes {piece.start} to {piece.start + piece.num_bytes}"
    if not piece.box.shape:
        return piece.box.name
    start = piece.box.offset[0]
    return f"{piece.box.name}, rows {start} to {start + piece.box.sizes[0]}"
