"""A universal checkpoint made of a source: one job for a stretch of rows of one file, streamed."""

import itertools
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.block_writer import as_bytes, write_at
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import OPTIMIZER, WEIGHTS
from mempar.runtime.durable import sync
from mempar.tools.convert.deepspeed.crc import combined
from mempar.tools.convert.deepspeed.description import Blocks, Description, encode
from mempar.tools.convert.deepspeed.files import LATEST, folder_of, small_files
from mempar.tools.convert.deepspeed.places import Place, cut_of, place_of
from mempar.tools.convert.deepspeed.tensor_file import TensorFile
from mempar.tools.convert.plan import Advance, Job, Plan
from mempar.tools.convert.source import Source

# Bytes of a file with a checksum of their own: read together, so as many as memory has easily room for.
_BLOCK_BYTES = 1 << 24
# Bytes of a file in one job, which is done again whole when it was interrupted.
_JOB_BYTES = 1 << 30
# A job holds its block in the source's precision and in the file's, and to compare it twice more.
_COPIES = 4


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A file with a tensor.

    Attributes:
        path: in the folder.
        file: its layout.
        name: the tensor that it is made of.
        rounded: another one that must be this one rounded, and is not written; None where there is none.
    """

    path: str
    file: TensorFile
    name: str
    rounded: str | None

    @property
    def rows(self) -> int:
        return self.file.shape[0] if self.file.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.file.num_bytes // max(1, self.rows)


def plan_deepspeed(source: Source, *, memory_bytes: int) -> Plan:
    """Plan a universal checkpoint.

    Args:
        source: of a model, with the state of its optimizers or without.
        memory_bytes: that one job may take.

    Raises:
        CheckpointError: when universal checkpoints have no place for a tensor.
    """
    targets = _targets(source)
    folder = folder_of(source.progress)
    block_bytes = max(1, min(_BLOCK_BYTES, memory_bytes // (2 * _COPIES)))
    jobs = [
        _job(source, target, folder, first, last, max(1, block_bytes // max(1, target.row_bytes)))
        for target in targets
        for first, last in _stretches(source.cuts(target.name), target.row_bytes)
    ]
    return Plan(
        what=f"a DeepSpeed universal checkpoint of {sum(target.file.num_bytes for target in targets)} bytes of tensors",
        jobs=jobs,
        prepare=partial(_prepare, targets, folder),
        finish=partial(_finish, source, targets, folder),
    )


def _targets(source: Source) -> list[_Target]:
    of_path: dict[str, list[tuple[str, Place]]] = {}
    for name in sorted(source.tensors):
        place = place_of(name, source.tensors)
        of_path.setdefault(place.path, []).append((name, place))
    targets = []
    for path, found in of_path.items():
        # The weights come before their copy that is stepped or stand alone.
        found.sort(key=lambda item: item[0] != item[1].parameter)
        name, place = found[-1]
        if len(found) > 2:
            raise CheckpointError(
                f"{source.root} holds {', '.join(name for name, _ in found)}, which are one and the same; a parameter "
                "has one copy that is stepped; the source is damaged."
            )
        shape = source.tensors[name].shape
        extras = cut_of(place.parameter, shape) if place.parameter is not None else {}
        file = TensorFile(dtype=place.dtype, shape=shape, extras=extras)
        targets.append(_Target(path=path, file=file, name=name, rounded=found[0][0] if len(found) > 1 else None))
    return targets


def _stretches(cuts: list[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows of one job each, cut where the source is read without reading anything twice."""
    start = 0
    for cut, after in itertools.pairwise([*cuts, cuts[-1]]):
        if cut > start and (after == cut or (after - start) * row_bytes > _JOB_BYTES):
            yield start, cut
            start = cut
    if cuts == [0]:
        yield 0, 1


def _job(source: Source, target: _Target, folder: str, first: int, last: int, block_rows: int) -> Job:
    names = [name for name in (target.name, target.rounded) if name is not None]
    rows = min(block_rows, last - first)
    share = (last - first) / max(1, target.rows)
    return Job(
        key=f"{target.path} {first}:{last} by {block_rows}",
        bytes_read=round(share * sum(_num_bytes(source, name) for name in names)),
        bytes_written=(last - first) * target.row_bytes,
        memory_bytes=sum(map(source.memory_bytes, names)) + _COPIES * rows * target.row_bytes,
        run=partial(_write, source, target, folder, first, last, block_rows),
    )


def _num_bytes(source: Source, name: str) -> int:
    record = source.tensors[name]
    return prod(record.shape) * getattr(torch, record.dtype).itemsize


def _prepare(targets: list[_Target], folder: str, directory: Path) -> None:
    for target in targets:
        path = directory / folder / target.path
        path.parent.mkdir(parents=True, exist_ok=True)
        # What jobs have written of it stays.
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(file, target.file.file_bytes)
        os.close(file)


def _write(
    source: Source,
    target: _Target,
    folder: str,
    first: int,
    last: int,
    block_rows: int,
    directory: Path,
    advance: Advance,
) -> dict[str, Any]:
    """Write rows of a file, block by block; return where blocks end, and their checksums."""
    ends, crcs = [], []
    file = os.open(directory / folder / target.path, os.O_WRONLY)
    try:
        with ExitStack() as stack:
            names = [name for name in (target.name, target.rounded) if name is not None]
            streams = [_Stream(source, name, stack, first, last) for name in names]
            for start in range(first, last, block_rows):
                stop = min(last, start + block_rows)
                numbers, *rounded = [stream.read(stop - start) for stream in streams]
                for other in rounded:
                    _compare(source, target, numbers, other)
                data = as_bytes(numbers.to(getattr(torch, target.file.dtype)).contiguous())
                write_at(file, data, target.file.start + start * target.row_bytes)
                ends.append(stop)
                crcs.append(zlib.crc32(data))
                advance(len(data))
        os.fsync(file)
    finally:
        os.close(file)
    return {"path": target.path, "first": first, "ends": ends, "crcs": crcs}


class _Stream:
    """Rows of a tensor of any shape, one without dimensions being one row."""

    def __init__(self, source: Source, name: str, stack: ExitStack, first: int, last: int) -> None:
        self.source, self.name, self.record = source, name, source.tensors[name]
        self.rows = stack.enter_context(source.stream(name, first, last)) if self.record.shape else None

    def read(self, count: int) -> Tensor:
        shape = (count, *self.record.shape[1:]) if self.record.shape else ()
        numbers = torch.empty(shape, dtype=getattr(torch, self.record.dtype))
        if self.rows is not None:
            self.rows.read(numbers)
        else:
            self.source.read(Box(name=self.name, dtype=self.record.dtype, shape=(), offset=(), sizes=()), numbers)
        return numbers


def _compare(source: Source, target: _Target, numbers: Tensor, rounded: Tensor) -> None:
    if not torch.equal(_bits(numbers.to(rounded.dtype)), _bits(rounded)):
        raise CheckpointError(
            f"{target.rounded} in {source.root} is not {target.name} rounded to {rounded.dtype}; universal checkpoints "
            "hold the copy that is stepped and round it when they are loaded; convert one of the two alone, with "
            "--weights-only."
        )


def _bits(tensor: Tensor) -> Tensor:
    """The bits of numbers; numbers that are none are not equal to themselves."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _finish(
    source: Source, targets: list[_Target], folder: str, directory: Path, results: dict[str, dict[str, Any]]
) -> None:
    """Complete the files with tensors, now that their checksums are known, and write all others."""
    root = directory / folder
    blocks = {target.path: Blocks(cuts=[0], crcs=[]) for target in targets}
    for result in sorted(results.values(), key=lambda result: result["first"]):
        blocks[result["path"]].cuts.extend(result["ends"])
        blocks[result["path"]].crcs.extend(result["crcs"])
    for target in targets:
        _complete(root / target.path, target, blocks[target.path])
    description = Description(
        run=source.run,
        tensors=source.tensors,
        has_digests=source.has_digests,
        progress=source.progress,
        about=source.about,
        blocks=blocks,
    )
    parameters = {name: record.shape for name, record in source.tensors.items() if record.kind == WEIGHTS}
    has_state = any(record.kind == OPTIMIZER for record in source.tensors.values())
    small = small_files(parameters, source.progress, has_state=has_state)
    for path, content in {**small, **encode(description)}.items():
        _write_small(root / path, content)
    _write_small(directory / LATEST, folder.encode())
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync(path)


def _complete(path: Path, target: _Target, blocks: Blocks) -> None:
    sizes = [(stop - start) * target.row_bytes for start, stop in itertools.pairwise(blocks.cuts)]
    crc = combined(zip(blocks.crcs, sizes, strict=True))
    file = os.open(path, os.O_WRONLY)
    try:
        write_at(file, target.file.head(crc), 0)
        write_at(file, target.file.tail(crc), target.file.start + target.file.num_bytes)
        os.fsync(file)
    finally:
        os.close(file)


def _write_small(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
