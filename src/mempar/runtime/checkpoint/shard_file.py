"""A shard of one tensor as a safetensors file: a JSON header, then the numbers, row by row.

Rows come in blocks (see boxes.py), each a piece with a checksum of its own. Blocks are written
independently of each other, at places that are known beforehand.
"""

import json
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mempar.memory.digest import digest_box
from mempar.runtime.checkpoint.block_writer import ALIGNMENT, as_bytes, write_at
from mempar.runtime.checkpoint.boxes import Box, row_blocks
from mempar.runtime.checkpoint.manifest import FileRecord, Piece, checksum

SUFFIX = ".safetensors"
# safetensors' names of torch's types.
_TYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "uint8": "U8"}


def path_of(box: Box) -> str:
    """The file of a shard, from its place: ranges of rows, and of columns where there are any."""
    ranges = zip(("rows", "columns"), box.offset, box.sizes, strict=False)
    place = ".".join(f"{what}-{start:010d}-{start + size:010d}" for what, start, size in ranges)
    return f"tables/{box.name}/{place}{SUFFIX}"


def dtype_name(dtype: torch.dtype) -> str:
    """A type as boxes spell it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(box: Box) -> torch.dtype:
    """The type of a box's numbers.

    Raises:
        ValueError: when it is none of those that files of shards hold.
    """
    if box.dtype not in _TYPE_NAMES:
        raise ValueError(f"numbers of type {box.dtype}")
    return getattr(torch, box.dtype)


class ShardFile:
    """The file of a shard, whose blocks are written in any order, by anyone who has opened it."""

    def __init__(self, box: Box) -> None:
        """Lay it out.

        Args:
            box: which part of which tensor it is.
        """
        self.box = box
        self.path = path_of(box)
        self.header = _header(box)
        self.row_bytes = prod(box.sizes[1:]) * dtype_of(box).itemsize

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.header) + self.box.sizes[0] * self.row_bytes

    @property
    def head(self) -> Piece:
        """The piece that comes before the numbers."""
        return Piece(start=0, num_bytes=len(self.header), checksum=checksum(self.header))

    def piece_of(self, block: Box, part: Tensor) -> tuple[Piece, int]:
        """The piece that a block of rows makes up, and its digest."""
        data = as_bytes(part)
        start = len(self.header) + (block.offset[0] - self.box.offset[0]) * self.row_bytes
        piece = Piece(start=start, num_bytes=len(data), checksum=checksum(data), box=block)
        return piece, int(digest_box(block.name, part, block.offset, block.shape))


def write_shard_file(
    directory: Path, box: Box, tensor: Tensor, block_rows: int, each: Callable[..., Iterator]
) -> tuple[FileRecord, int]:
    """Write a shard; the caller brings it to the disk.

    Args:
        directory: of the checkpoint.
        box: which part of which tensor it is.
        tensor: its numbers, on any device.
        block_rows: rows of the whole tensor in a block.
        each: runs a function on each item, like `map`.

    Returns:
        What was written, and the shard's digest as an unsigned number of 64 bits.

    Raises:
        OSError: when the file cannot be written.
    """
    shard = ShardFile(box)
    path = directory / shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_at(file, shard.header, 0)

        def write_block(block: Box) -> tuple[Piece, int]:
            first = block.offset[0] - box.offset[0]
            part = tensor[first : first + block.sizes[0]].detach().cpu().contiguous()
            piece, digest = shard.piece_of(block, part)
            write_at(file, as_bytes(part), piece.start)
            return piece, digest

        written = list(each(write_block, row_blocks(box, block_rows)))
    finally:
        os.close(file)
    record = FileRecord(path=shard.path, pieces=(shard.head, *(piece for piece, _ in written)))
    return record, sum(digest for _, digest in written) % 2**64


def _header(box: Box) -> bytes:
    num_bytes = box.num_elements * dtype_of(box).itemsize
    entry = {"dtype": _TYPE_NAMES[box.dtype], "shape": box.sizes, "data_offsets": [0, num_bytes]}
    about = {"shape": json.dumps(box.shape), "offset": json.dumps(box.offset)}
    text = json.dumps({"__metadata__": about, box.name: entry}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
