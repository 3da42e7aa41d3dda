"""Signs of life: what every rank leaves behind for its launcher to read when something goes wrong.

A rank maps a small file of the run's directory into memory and writes its step, its phase and the time there: a
microsecond a mark and no system call, so it may do so at every micro-batch. The kernel keeps the page when the rank
dies, however it dies. Files are named by host and process, as the rank is not known yet when the first sign is given;
ranks of several hosts share the directory.

All ranks of a run give the same marks in the same order, so that their numbers of marks can be compared; beats, which
depend on a rank's part of the work, renew the time alone. Nothing here imports torch.
"""

import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mempar.errors import MemparError

_SUFFIX, _STACK_SUFFIX = ".life", ".stack"
# Rank, process, step, phase, number of marks; time of the last sign, time of the last mark; host, of DNS's length.
_RECORD = struct.Struct("<5q2d256s")
_MARK = struct.Struct("<3q2d")
_MARK_OFFSET = 16
_BEAT = struct.Struct("<d")
_BEAT_OFFSET = 40


class Phase(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    DATA = 1
    FORWARD_BACKWARD = 2
    UPDATE = 3
    COPY_CHECK = 4
    EVALUATION = 5
    SAVING = 6
    ENDING = 7

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-").replace("copy-check", "comparing copies")

    @property
    def is_lively(self) -> bool:
        """Whether signs follow each other within one collective's patience; starting and saving may take longer."""
        return self in (Phase.DATA, Phase.FORWARD_BACKWARD, Phase.UPDATE, Phase.EVALUATION)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A rank's last sign of life.

    Attributes:
        rank: its number in the world; -1 as long as it does not know it.
        pid: its process.
        host: where that runs: the name of its node.
        step: the step in hand, counted from 1; 0 before any.
        phase: what it was doing.
        num_marks: how many marks it gave: comparable between ranks.
        time: of the last sign, in seconds since the epoch.
    """

    rank: int
    pid: int
    host: str
    step: int
    phase: Phase
    num_marks: int
    time: float


class Heartbeat:
    """This rank's sign of life."""

    def __init__(self, directory: Path | None = None, node: str = "") -> None:
        """Give the first sign.

        Args:
            directory: where the launcher looks for signs; None gives them to nobody.
            node: as the launcher calls this node; the host's name unless given.

        Raises:
            MemparError: when nothing can be written there.
        """
        self.path: Path | None = None
        host, pid = node or socket.gethostname(), os.getpid()
        if directory is None:
            self._page = mmap.mmap(-1, _RECORD.size)
        else:
            self.path = directory / f"{host}-{pid}{_SUFFIX}"
            try:
                self._page = _map_aside(self.path)
            except OSError as error:
                raise not_writable(self.path, error) from None
        now = time.time()
        _RECORD.pack_into(self._page, 0, -1, pid, 0, Phase.STARTING, 0, now, now, host.encode()[:256])
        self._num_marks = 0
        if self.path is not None:
            _aside(self.path).rename(self.path)

    @property
    def stack_path(self) -> Path | None:
        """Where to write where this rank is, when the launcher asks for it; None without a directory."""
        return self.path and self.path.with_suffix(_STACK_SUFFIX)

    def identify(self, rank: int) -> None:
        """Say which rank of the world this is."""
        struct.pack_into("<q", self._page, 0, rank)

    def mark(self, phase: Phase, step: int) -> None:
        """Say that a phase of a step (counted from 1) begins; every rank must do so."""
        self._num_marks += 1
        now = time.time()
        _MARK.pack_into(self._page, _MARK_OFFSET, step, phase, self._num_marks, now, now)

    def beat(self) -> None:
        """Say that the work goes on."""
        _BEAT.pack_into(self._page, _BEAT_OFFSET, time.time())

    @property
    def sign(self) -> Sign:
        """What others see of it."""
        return _unpack(self._page[:])


def files_in(directory: Path, suffix: str) -> list[Path]:
    """Files of one kind among the signs of life; none where the head's launcher has just removed them all."""
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if name.endswith(suffix)]
    except OSError:
        return []


def read_signs(directory: Path, host: str = "") -> list[Sign]:
    """Read the signs of all ranks that gave one, on a host or on all, in the order of the ranks."""
    signs = []
    for path in files_in(directory, _SUFFIX):
        if host and path.stem.rpartition("-")[0] != host:
            continue
        try:
            signs.append(_unpack(path.read_bytes()))
        except (OSError, struct.error, ValueError):
            # Deleted in between, or not yet on this host's side of a shared file system.
            continue
    return sorted(signs, key=lambda sign: (sign.rank, sign.host, sign.pid))


def stack_of(directory: Path, sign: Sign) -> str:
    """Name the file in which a rank wrote where it was, when it was asked to; empty if it did not."""
    path = directory / f"{sign.host}-{sign.pid}{_STACK_SUFFIX}"
    return str(path) if path.is_file() and path.stat().st_size else ""


def not_writable(path: Path, error: OSError) -> MemparError:
    """Say that signs of life cannot be given."""
    return MemparError(
        f"{path} cannot be written ({error.strerror}); ranks give signs of life there; make room or see to the disk, "
        "and continue with --resume."
    )


def _aside(path: Path) -> Path:
    return path.with_suffix(".partial")


def _map_aside(path: Path) -> mmap.mmap:
    """Map a record that gets its name later: whoever sees the file finds a whole record in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _aside(path).write_bytes(bytes(_RECORD.size))
    with _aside(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), _RECORD.size)


def _unpack(record: bytes) -> Sign:
    rank, pid, step, phase, num_marks, last, _, host = _RECORD.unpack(record)
    name = host.rstrip(b"\0").decode(errors="replace")
    return Sign(rank=rank, pid=pid, host=name, step=step, phase=Phase(phase), num_marks=num_marks, time=last)
