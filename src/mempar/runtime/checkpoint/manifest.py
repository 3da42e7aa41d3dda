"""manifest.json: what a checkpoint is made of, piece by piece, and the proof that it is all there.

    step_00000100/
      manifest.json               this file; a directory of this name without it is no checkpoint
      config.yaml                 the resolved run
      dense/                      megatron's distributed checkpoint (torch_dist)
      tables/NAME/*.safetensors   shards of tables, their optimizers' state and histories

Every byte of every file belongs to one piece: a box of a tensor, or something else (a header, a description).
A piece has a checksum, computed while it was written; the manifest ends with its own. A tensor has a digest
that does not depend on its cut into pieces. A checkpoint is untrusted input: paths that leave the directory,
pieces that do not fit their files and numbers of the wrong kind are refused here, for all readers. Nothing
here imports torch.
"""

import errno
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from mempar.errors import CheckpointError, DamagedError, UnreadableError
from mempar.runtime.checkpoint.boxes import Box, check_cover

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
FORMAT = 3
# Bytes of a number, by its type as torch spells it.
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1}
WEIGHTS, OPTIMIZER, HISTORY = "weights", "optimizer", "history"

# Of a disk, a network, an account or a process short of something: the file may be as it was written.
_PASSING = (
    *(errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR),
)
# A piece takes some 150 bytes: room for millions.
_LARGEST_BYTES = 1 << 30
# Counters of a run in `progress`, and those of them that every checkpoint has.
_COUNTERS = ("step", "applied_steps", "tokens", "samples", "rollbacks", "skips_in_a_row")
_NEEDED = ("step", "applied_steps")
# For each memory whose rows have a history, the step after which it begins.
HISTORY_SINCE = "history_since"
# What else describes a checkpoint, each by names.
_DESCRIPTIONS = ("layout", "data", "random", "versions", HISTORY_SINCE, "huggingface")
# What of it a run that goes on from a checkpoint passes on: where its weights came from.
PASSED_ON = ("huggingface",)
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SEAL = ',\n"checksum": "'


class NoCheckpointError(CheckpointError):
    """A directory that is none, or not that of a checkpoint."""


def checksum(data: Any) -> str:
    """128 bits of XXH3 of a buffer, in hexadecimal: against damage, not against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a file.

    Attributes:
        start: its first byte in the file.
        num_bytes: its length.
        checksum: of its bytes.
        box: what part of which tensor it holds; None for anything else.
        key: under which megatron keeps it, for things of its own that are no tensors.
    """

    start: int
    num_bytes: int
    checksum: str
    box: Box | None = None
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of a checkpoint: its path in the directory, and its pieces in order, without gaps."""

    path: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A logical tensor: `digest` is the sum over its pieces, modulo 2^64; `kind` one of weights, optimizer, history."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    digest: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        root: its directory.
        progress: how far the run was: `step`, `samples` (the position in the data) and other counters.
        about: what else describes it: `layout`, `data`, `random`, `versions`; plain JSON.
        tensors: by name.
        files: by path.
    """

    root: Path
    progress: dict[str, Any]
    about: dict[str, Any]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    _places: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        """Steps of the run that are in it."""
        return self.progress["step"]

    @property
    def weights_only(self) -> bool:
        """Whether it has no optimizer's state: a run that goes on from it begins with a new one."""
        return all(record.kind == WEIGHTS for record in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.num_bytes for record in self.files.values())

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """All pieces with their files' paths."""
        for path, record in self.files.items():
            for piece in record.pieces:
                yield path, piece

    def pieces_of(self, name: str) -> list[tuple[str, Piece]]:
        """The pieces of one tensor with their files' paths."""
        if not self._places:
            for path, piece in self.pieces():
                if piece.box is not None:
                    self._places.setdefault(piece.box.name, []).append((path, piece))
        return self._places.get(name, [])


def write_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest, sealed with its checksum."""
    body = {
        "format": FORMAT,
        "progress": manifest.progress,
        **manifest.about,
        "tensors": {
            name: {"dtype": t.dtype, "shape": t.shape, "kind": t.kind, "digest": f"{t.digest:016x}"}
            for name, t in sorted(manifest.tensors.items())
        },
        "files": {
            path: [encode_piece(piece) for piece in record.pieces] for path, record in sorted(manifest.files.items())
        },
    }
    return _seal(json.dumps(body, indent=None, separators=(",", ":")).replace('],"', '],\n"').replace('},"', '},\n"'))


def read_manifest(root: Path) -> Manifest:
    """Read a checkpoint's manifest and look whether its files are there with their sizes.

    Raises:
        CheckpointError: naming the file that is missing, damaged or not what it should be.
    """
    path = root / MANIFEST
    raw = _read_sealed(root, path)
    body, mark, _ = raw.decode(errors="replace").rpartition(_SEAL)
    if not mark or _seal(body + "}") != raw:
        raise damaged(path, "its checksum is not that of its text")
    try:
        manifest = _decode(root, json.loads(body + "}"))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"it does not describe a checkpoint ({type(error).__name__}: {error})") from None
    for record in manifest.files.values():
        check_file(root, record)
    return manifest


def _read_sealed(root: Path, path: Path) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_BYTES:
            raise damaged(path, f"it is no plain file of at most {_LARGEST_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        if error.errno in _PASSING:
            raise not_read(path, error) from None
        why = "it has no manifest.json" if not path.exists() else f"its manifest.json cannot be read ({error.strerror})"
        raise NoCheckpointError(
            f"{root} is no checkpoint: {why}; name a checkpoints/step_XXXXXXXX directory of a run."
        ) from None


def check_file(root: Path, record: FileRecord) -> None:
    """Check that a file of a checkpoint is a plain file inside it, with its size.

    Raises:
        CheckpointError: naming the file.
    """
    path = root / record.path
    try:
        # A link on the way could lead anywhere.
        for part in (path, *path.parents[: len(PurePosixPath(record.path).parts) - 1]):
            if part.is_symlink():
                raise damaged(path, "it, or a directory on its way, is a symbolic link")
        status = path.stat()
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except OSError as error:
        raise not_read(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged(path, "it is not a plain file")
    if status.st_size != record.num_bytes:
        raise damaged(path, f"it has {status.st_size} bytes where {record.num_bytes} were written")


def damaged(path: Path, why: str) -> DamagedError:
    """What is said of a damaged file."""
    return DamagedError(
        f"{path} is damaged: {why}; a checkpoint is used whole or not at all; use another one, or restore the file."
    )


def not_read(path: Path, error: OSError, what: str = "it") -> CheckpointError:
    """What is said of a file that cannot be read: that it is damaged, unless the reason may pass."""
    why = f"{what} cannot be read ({error.strerror})"
    if error.errno not in _PASSING:
        return damaged(path, why)
    return UnreadableError(
        f"{path}: {why}; a checkpoint is used whole, and an older one only where it is damaged; see to the disk, the "
        "network and permissions, and try again, or move that checkpoint away to go on without it."
    )


def encode_piece(piece: Piece) -> list[Any]:
    """A piece as the manifest has it: plain JSON."""
    place: list[Any] = [piece.key] if piece.key else []
    if piece.box is not None:
        place = [piece.box.name, piece.box.offset, piece.box.sizes]
    return [piece.num_bytes, piece.checksum, *place]


def _seal(text: str) -> bytes:
    """Put the checksum of a JSON object's text behind its last member."""
    return f'{text[:-1]}{_SEAL}{checksum(text.encode())}"}}\n'.encode()


def _decode(root: Path, body: dict[str, Any]) -> Manifest:
    if body.pop("format") != FORMAT:
        raise CheckpointError(
            f"{root} has another format than {FORMAT}, which this version reads; use the mempar that wrote it."
        )
    tensors = {name: _decode_tensor(name, entry) for name, entry in body.pop("tensors").items()}
    files = {path: _decode_file(root, path, pieces, tensors) for path, pieces in body.pop("files").items()}
    progress = body.pop("progress")
    _check_progress(progress)
    if not all(isinstance(body.get(name, {}), dict) for name in _DESCRIPTIONS):
        raise TypeError("what describes the run is not described by names")
    manifest = Manifest(root=root, progress=progress, about=body, tensors=tensors, files=files)
    for name, record in tensors.items():
        check_cover(name, record.shape, [piece.box for _, piece in manifest.pieces_of(name) if piece.box is not None])
    return manifest


def _decode_tensor(name: str, entry: dict[str, Any]) -> TensorRecord:
    # Names become names of files.
    if not _TENSOR_NAME.fullmatch(name):
        raise ValueError("a tensor has a name that no parameter can have")
    if entry["dtype"] not in DTYPE_BYTES or entry["kind"] not in (WEIGHTS, OPTIMIZER, HISTORY):
        raise ValueError(f"{name} has numbers of type {entry['dtype']}, and is {entry['kind']}")
    shape = _sizes(entry["shape"])
    return TensorRecord(dtype=entry["dtype"], shape=shape, kind=entry["kind"], digest=int(entry["digest"], 16))


def _check_progress(progress: dict[str, Any]) -> None:
    _sizes([progress[name] for name in _NEEDED])
    _sizes([progress[name] for name in _COUNTERS if name in progress])
    for step, loss in progress.get("losses", []):
        _sizes([step])
        float(loss)


def _decode_file(root: Path, path: str, pieces: list[Any], tensors: dict[str, TensorRecord]) -> FileRecord:
    parts = PurePosixPath(path).parts
    # Printable text alone: names are shown on terminals.
    if not parts or path[0] == "/" or ".." in parts or not path.isprintable() or str(PurePosixPath(path)) != path:
        raise damaged(root / MANIFEST, f"it names the file {path!r}, which is no path inside the checkpoint")
    decoded, start = [], 0
    for entry in pieces:
        decoded.append(decode_piece(entry, start, tensors))
        start += decoded[-1].num_bytes
    return FileRecord(path=path, pieces=tuple(decoded))


def decode_piece(entry: list[Any], start: int, tensors: Mapping[str, TensorRecord]) -> Piece:
    """A piece from what `encode_piece` made of it.

    Args:
        entry: the piece.
        start: where in its file it begins.
        tensors: all that there may be pieces of.

    Raises:
        ValueError: when it cannot be; KeyError or TypeError when it is nothing of the kind.
    """
    num_bytes, digits, *place = entry
    box, key = None, ""
    if len(place) == 1:
        key = place[0]
        if not isinstance(key, str) or not key.isprintable():
            raise ValueError("a thing has no name that can be shown")
    elif place:
        name, offset, sizes = place
        box = Box(
            name=name,
            dtype=tensors[name].dtype,
            shape=tensors[name].shape,
            offset=_sizes(offset),
            sizes=_sizes(sizes),
        )
        inside = all(at + size <= of for at, size, of in zip(box.offset, box.sizes, box.shape, strict=True))
        if not inside or box.num_elements > num_bytes:
            raise ValueError(f"a piece of {name} does not fit")
    return Piece(start=start, num_bytes=_sizes([num_bytes])[0], checksum=str(digits), box=box, key=key)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return tuple(numbers)
