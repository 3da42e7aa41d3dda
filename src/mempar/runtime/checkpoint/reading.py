"""Reading parts of logical tensors from a checkpoint of any layout, every piece checked before it is used."""

import os
from pathlib import Path

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import Manifest, Piece, check_file, checksum, damaged
from mempar.runtime.checkpoint.names import stored_name


class Reader:
    """Reads from one checkpoint; only pieces that overlap what is asked for, and those whole."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.bytes_read = 0

    def read(self, box: Box, target: Tensor) -> None:
        """Fill a tensor with a part of a logical tensor.

        Args:
            box: the part; its name may be any under which the checkpoint holds the same (see names.py).
            target: of the part's sizes, on any device, overwritten.

        Raises:
            CheckpointError: when the checkpoint does not hold it, or a piece is damaged.
        """
        name = stored_name(box.name, self.manifest.tensors)
        record = self.manifest.tensors.get(name)
        if record is None or record.shape != box.shape or record.dtype != box.dtype:
            held = "nothing of this name" if record is None else f"{record.dtype} {list(record.shape)}"
            raise CheckpointError(
                f"{self.manifest.root} does not hold {box.name} as {box.dtype} {list(box.shape)}, but {held}; a "
                "checkpoint is continued by a run of the same model and precision; use its settings."
            )
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
                self._read_bytes(path, piece, shard_file.as_bytes(view))
            else:
                view.copy_(self.read_piece(path, piece)[theirs])
            missing -= view.numel()
        if missing:
            raise damaged(self.manifest.root, f"{missing} elements of {name} are in none of its files")

    def read_piece(self, path: str, piece: Piece) -> Tensor:
        """Read one piece of a tensor, whole.

        Raises:
            CheckpointError: when it is damaged.
        """
        data = bytearray(piece.num_bytes)
        self._read_bytes(path, piece, memoryview(data))
        assert piece.box is not None
        try:
            if path.endswith(shard_file.SUFFIX):
                tensor = torch.frombuffer(data, dtype=shard_file.dtype_of(piece.box)).view(piece.box.sizes)
            else:
                tensor = torch_dist.load_piece(data)
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
        self._read_bytes(path, piece, memoryview(bytearray(piece.num_bytes)))

    def _read_bytes(self, path: str, piece: Piece, into: memoryview) -> None:
        check_file(self.manifest.root, self.manifest.files[path])
        try:
            with self._path(path).open("rb", buffering=0) as file:
                file.seek(piece.start)
                done = 0
                while done < len(into) and (count := file.readinto(into[done:])):
                    done += count
        except OSError as error:
            raise damaged(
                self._path(path), f"{_place(piece)} cannot be read ({os.strerror(error.errno or 0)})"
            ) from None
        self.bytes_read += done
        if done < len(into) or checksum(into) != piece.checksum:
            raise damaged(self._path(path), f"the checksum of {_place(piece)} is not that of what was written")

    def _path(self, path: str) -> Path:
        return self.manifest.root / path


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def _place(piece: Piece) -> str:
    if piece.box is None:
        return f"bytes {piece.start} to {piece.start + piece.num_bytes}"
    if not piece.box.shape:
        return piece.box.name
    start = piece.box.offset[0]
    return f"{piece.box.name}, rows {start} to {start + piece.box.sizes[0]}"
