"""The file format of recorded slot choices: what `slot_trace.py` records, as arrays without pickles or torch.

With `train.trace_steps=N` ranks write the choices of their memory layers in the first N steps of a launch to
`slots/from_FIRSTSTEP/` in the run's directory, a file a step and rank (slot_recording.py): a set, which is read as one
trace. A file holds for each block that it knows

    block_00004.steps    [n] int64, steps from 0
    block_00004.samples  [n] int64, numbers of the samples in the run
    block_00004.slots    [n, s, H, K] int32, -1 at positions that this rank did not see

Files are untrusted: nothing is read before a member's header says what it is to be, and its size what the header says.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.durable import replace_file

FOLDER = "slots"
# Of the sets in it, by the first step of the launch.
SET_NAME = re.compile(r"from_(\d{8})")
# What stands at positions that nobody recorded: no slot has this number.
UNKNOWN = -1
# (step, block, sample id)
TraceKey = tuple[int, int, int]
_MEMBER = re.compile(r"(block_\d{5})\.(steps|samples|slots)\.npy")
# The beginning of an array as numpy writes it: in format 1.0, little-endian, C order.
_HEADER = re.compile(rb"\{'descr': '<(i[48])', 'fortran_order': False, 'shape': \(([\d, ]{1,100})\), \} *\n")
_MAGIC, _LENGTH = b"\x93NUMPY\x01\x00", struct.Struct("<H")
# Type and dimensions of each part.
_KINDS = {"steps": ("i8", 1), "samples": ("i8", 1), "slots": ("i4", 4)}
# Bytes that a byte of a deflated file can stand for at the most.
_MOST_DEFLATED = 1032
# What zipfile and zlib raise when they are given something else.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_Found = TypeVar("_Found")


def set_name(first_step: int) -> str:
    """Name of the directory of a launch's set."""
    return f"from_{first_step:08d}"


def save_slots(path: Path, slots: Mapping[TraceKey, np.ndarray]) -> None:
    """Write choices, whole or not at all.

    Args:
        path: a file, which is replaced.
        slots: for each (step, block, sample) `[s, H, K] int32`; equally shaped within a block.
    """
    by_block: dict[int, list[TraceKey]] = defaultdict(list)
    for key in sorted(slots):
        by_block[key[1]].append(key)
    arrays = {}
    for block, keys in by_block.items():
        arrays[_name(block, "steps")] = np.array([step for step, _, _ in keys], dtype=np.int64)
        arrays[_name(block, "samples")] = np.array([sample for _, _, sample in keys], dtype=np.int64)
        arrays[_name(block, "slots")] = np.stack([slots[key] for key in keys]).astype(np.int32)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    replace_file(path, content.getvalue())


def load_slots(path: Path, *, first_step_only: bool = False) -> dict[TraceKey, np.ndarray]:
    """Read a file or a set as one trace.

    Args:
        path: a file; a set's directory; or `slots/` or the run's directory, of which the set that begins at the highest
            step is read, the newest, and no other.
        first_step_only: read no more than the first step that was recorded.

    Raises:
        ConfigError: where there is none, where one cannot be read, or where two disagree.
    """
    files = _files_at(path)
    step = None
    if first_step_only:
        step = min((step for file in files for step in _of_file(file, _steps)), default=0)
    found: dict[TraceKey, np.ndarray] = {}
    for file in files:
        for key, slots in _of_file(file, lambda archive: _choices(archive, step)).items():
            found[key] = slots if key not in found else _joined(file, key, found[key], slots)
    return found


def _files_at(path: Path) -> list[Path]:
    """The files of one set."""
    files = [path] if path.is_file() else sorted(path.glob("*.npz"))
    for folder in (path / FOLDER, path):
        sets = sorted(each for each in folder.glob("from_*") if SET_NAME.fullmatch(each.name) and each.is_dir())
        if not files and sets:
            files = sorted(sets[-1].glob("*.npz"))
    if not files:
        raise ConfigError(
            f"{path} holds no recorded slots: they are written by a run with train.trace_steps=N to {FOLDER}/from_*/ "
            "in its directory; give the run's directory, one of these, or a file in it."
        )
    return files


def _of_file(file: Path, read: Callable[[zipfile.ZipFile], _Found]) -> _Found:
    """What is read from a file."""
    try:
        with file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            members, size = archive.infolist(), file.stat().st_size
            if sum(member.file_size for member in members) > _MOST_DEFLATED * size:
                raise ValueError(f"no {size} bytes hold as much as it says")
            if unknown := [member.filename for member in members if not _MEMBER.fullmatch(member.filename)]:
                raise ValueError(f"{unknown[0]!r} is no part of one")
            return read(archive)
    except _UNREADABLE as error:
        raise ConfigError(
            f"{file} is no file of recorded slots ({str(error) or type(error).__name__}): a run with "
            "train.trace_steps=N writes them; give one of those."
        ) from None


def _blocks(archive: zipfile.ZipFile) -> list[str]:
    """Blocks that a file knows, as its members are named."""
    return sorted({name.partition(".")[0] for name in archive.namelist()})


def _steps(archive: zipfile.ZipFile) -> set[int]:
    return {int(step) for block in _blocks(archive) for step in _array(archive, block, "steps")}


def _choices(archive: zipfile.ZipFile, step: int | None) -> dict[TraceKey, np.ndarray]:
    """What a file recorded, of one step if one is named."""
    found: dict[TraceKey, np.ndarray] = {}
    for name in _blocks(archive):
        steps, samples = _array(archive, name, "steps"), _array(archive, name, "samples")
        if step is not None and step not in steps:
            continue
        slots = _array(archive, name, "slots")
        if not len(steps) == len(samples) == len(slots):
            raise ValueError(f"{name} has steps {steps.shape}, samples {samples.shape}, slots {slots.shape}")
        least = [int(array.min(initial=0)) for array in (steps, samples, slots)]
        if least[0] < 0 or least[1] < 0 or least[2] < UNKNOWN:
            raise ValueError(f"{name} has a negative step, sample or slot: {min(least)}")
        block = int(name.removeprefix("block_"))
        keys = [(int(each), block, int(sample)) for each, sample in zip(steps, samples, strict=True)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{name} has a sample of a step twice")
        found |= {key: slots[place] for place, key in enumerate(keys) if step is None or key[0] == step}
    return found


def _array(archive: zipfile.ZipFile, block: str, part: str) -> np.ndarray:
    """One member, if it is what this part of a file is, and as long as its shape says."""
    name, (kind, num_dims) = f"{block}.{part}", _KINDS[part]
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is not deflated")
    with archive.open(info) as member:
        start = member.read(len(_MAGIC) + _LENGTH.size)
        if not start.startswith(_MAGIC):
            raise ValueError(f"{name} is no array")
        (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
        header = _HEADER.fullmatch(member.read(length))
        if header is None:
            raise ValueError(f"{name} is no array of whole numbers")
        shape = tuple(int(each) for each in header[2].decode().split(",") if each.strip())
        if header[1].decode() != kind or len(shape) != num_dims:
            raise ValueError(f"{name} has type {header[1].decode()} and shape {shape}")
        num_bytes = math.prod(shape) * np.dtype(kind).itemsize
        if info.file_size != len(start) + length + num_bytes:
            raise ValueError(f"{name} has {info.file_size} bytes and shape {shape}")
        # To the end, where the checksum is compared.
        content = member.read(num_bytes + 1)
    return np.frombuffer(content, dtype=f"<{kind}").reshape(shape)


def _joined(file: Path, key: TraceKey, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What two ranks saw of a sequence."""
    if one.shape != other.shape or ((one != other) & (one != UNKNOWN) & (other != UNKNOWN)).any():
        raise ConfigError(
            f"{file} and the files before it differ about (step, block, sample) {key}: they are of different runs; "
            "give the files of one run."
        )
    return np.where(one == UNKNOWN, other, one)


def _name(block: int, part: str) -> str:
    return f"block_{block:05d}.{part}"
