"""Megatron's (and torch's) distributed checkpoint on disk: a directory that megatron loads by itself.

    __RANK_0.distcp   tensors, each as torch.save writes it, one after the other
    .metadata         a pickle that says which box of which tensor lies where
    common.pt         what all ranks have in common
    metadata.json     the format's name

Written here rather than by megatron, so that the pieces' checksums and digests are computed on the way,
nothing is forked, and no rank need meet another one while it writes. Read without unpickling: the places
come from the manifest, the tensors through torch's loader of tensors alone; `.metadata` and `common.pt` are
for megatron, and of the two only `common.pt` is ever read, by a conversion, through the same loader.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mempar.memory.digest import digest_box
from mempar.runtime.checkpoint.boxes import Box, row_blocks
from mempar.runtime.checkpoint.manifest import FileRecord, Piece, checksum
from mempar.runtime.checkpoint.names import canonical

SUFFIX = ".distcp"
DIRECTORY = "dense"
# What makes the ranks' files a checkpoint for megatron.
DESCRIPTION = tuple(f"{DIRECTORY}/{name}" for name in (".metadata", "common.pt", "metadata.json"))


def path_of(rank: int, number: int = 0) -> str:
    """A file of a rank, its first one or one of several."""
    return f"{DIRECTORY}/__{rank}_{number}{SUFFIX}"


class RankFile:
    """A file of a rank in the making: one thing after another. The caller brings it to the disk."""

    def __init__(self, directory: Path, path: str) -> None:
        """Begin a file that is not there yet."""
        self._path = path
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        self._file = (directory / path).open("xb")
        self._pieces: list[Piece] = []

    def add_object(self, key: str, data: bytes | memoryview) -> None:
        """Append something that is no tensor, serialised."""
        self._append(data, key=key)

    def add_tensor(self, box: Box, part: Tensor) -> int:
        """Append a part of a tensor, contiguous numbers on the CPU; returns its digest."""
        digest = int(digest_box(canonical(box.name), part, box.offset, box.shape))
        self._append(saved(part), box=box)
        return digest

    def _append(self, data: Any, box: Box | None = None, key: str = "") -> None:
        start = self._file.tell()
        self._pieces.append(Piece(start=start, num_bytes=len(data), checksum=checksum(data), box=box, key=key))
        self._file.write(data)

    @property
    def record(self) -> FileRecord:
        """What was written."""
        return FileRecord(path=self._path, pieces=tuple(self._pieces))

    def __enter__(self) -> "RankFile":
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()


def write_rank_file(
    directory: Path, rank: int, tensors: list[tuple[Box, Tensor]], objects: dict[str, bytes], block_bytes: int
) -> tuple[FileRecord | None, dict[str, int]]:
    """Write what a rank holds; the caller brings it to the disk.

    Args:
        directory: of the checkpoint.
        rank: its number.
        tensors: parts of tensors.
        objects: other things that megatron keeps, serialised, by its keys.
        block_bytes: larger parts are cut, in rows of the whole tensor.

    Returns:
        What was written, None for nothing; digests by tensor.

    Raises:
        OSError: when the file cannot be written.
    """
    if not tensors and not objects:
        return None, {}
    digests: dict[str, int] = {}
    with RankFile(directory, path_of(rank)) as file:
        for key, data in objects.items():
            file.add_object(key, data)
        for whole, tensor in tensors:
            for box in row_blocks(whole, rows_of(whole, tensor.element_size(), block_bytes)):
                mine, _ = whole.overlap(box) or ((), ())
                # torch.save writes the whole storage that a view looks at.
                part = tensor[mine].detach().cpu().clone(memory_format=torch.contiguous_format)
                digests[box.name] = digests.get(box.name, 0) + file.add_tensor(box, part)
    return file.record, digests


def load_piece(data: Any) -> Tensor:
    """Read a piece that `write_rank_file` wrote, or megatron; nothing but a tensor is accepted.

    Raises:
        Exception: of many kinds, when it is anything else.
    """
    check_stored(data)
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.is_cpu:
        raise TypeError(f"a {type(tensor).__name__} where a tensor should be")
    return tensor


def check_stored(data: Any) -> None:
    """Refuse what torch.save does not write: records that are compressed may be a thousand times as long as they look.

    Raises:
        ValueError: when there is one; zipfile.BadZipFile when it is no archive at all.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed record")


def write_description(directory: Path, files: Iterable[FileRecord], common: bytes) -> list[FileRecord]:
    """Write the files that make the ranks' files a checkpoint for megatron.

    Args:
        directory: of the checkpoint.
        files: of the ranks.
        common: megatron's state dict without what is sharded, serialised.

    Returns:
        What was written.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in files:
        name = Path(record.path).name
        for piece in record.pieces:
            place = _StorageInfo(name, piece.start, piece.num_bytes)
            if (box := piece.box) is not None:
                entry = tensors.setdefault(
                    box.name,
                    TensorStorageMetadata(
                        properties=TensorProperties(dtype=getattr(torch, box.dtype)),
                        size=torch.Size(box.shape),
                        chunks=[],
                    ),
                )
                entry.chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.sizes)))
                places[MetadataIndex(box.name, torch.Size(box.offset), len(entry.chunks) - 1)] = place
            elif piece.key:
                tensors[piece.key] = BytesStorageMetadata()
                places[MetadataIndex(piece.key)] = place
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    metadata = pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places))
    contents = (metadata, common, json.dumps(backend).encode())
    return [write_small_file(directory, path, data) for path, data in zip(DESCRIPTION, contents, strict=True)]


def write_small_file(directory: Path, path: str, data: bytes | memoryview) -> FileRecord:
    """Write a file that is one piece."""
    (directory / path).parent.mkdir(parents=True, exist_ok=True)
    with (directory / path).open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path=path, pieces=(Piece(start=0, num_bytes=len(data), checksum=checksum(data)),))


def rows_of(box: Box, element_bytes: int, block_bytes: int) -> int:
    """Rows of the whole tensor whose part in a box fills a block."""
    row_bytes = box.num_elements * element_bytes // max(1, box.sizes[0] if box.sizes else 1)
    return max(1, block_bytes // max(1, row_bytes))


def saved(thing: Any) -> memoryview:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getbuffer()
