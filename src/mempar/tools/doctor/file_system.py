"""The file system below a directory: which one it is, its room, how fast it takes data, whether it locks.

What is written to find out lies in one hidden file, and is removed.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# As /proc/self/mounts calls them; FUSE adds a name of its own.
_NETWORK = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "wekafs", "pvfs2", "panfs",
    "gfs2", "ocfs2", "orangefs",
    "glusterfs", "virtiofs", "fuse.sshfs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse",
    "fuse.rclone", "fuse.mount-s3",
)  # fmt: skip
_IN_MEMORY = ("tmpfs", "ramfs")
_PREFIX = ".mempar-doctor-"
# Of the measurement. Blocks grow, so that a slow disk is not given more than it takes in time.
_MOST_BYTES, _MOST_SECONDS, _FREE_SHARE = 256 << 20, 3.0, 0.1
_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 20, 32 << 20


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted file system: what is mounted, where, and its kind."""

    device: str
    point: str
    kind: str

    @property
    def is_network(self) -> bool:
        """Whether other machines may have it too."""
        return self.kind in _NETWORK

    @property
    def is_in_memory(self) -> bool:
        """Whether it takes memory, and is gone with the machine."""
        return self.kind in _IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """What is below a directory.

    Attributes:
        path: the directory, or the nearest one above it that exists.
        mount: the file system.
        free_bytes: that this user may write.
        free_files: inodes; None where it does not count them.
        problem: why nothing can be written; empty if it can.
        bytes_per_s: that one process here wrote, with fsync; 0 if it was not measured.
        locks: whether `flock` keeps a second one out; None if it was not tried.
    """

    path: Path
    mount: Mount
    free_bytes: int
    free_files: int | None = None
    problem: str = ""
    bytes_per_s: float = 0.0
    locks: bool | None = None


def collect(directory: Path) -> FileSystem:
    """Look at a directory that may not exist yet; takes up to some three seconds."""
    path = directory.resolve()
    while not path.is_dir():
        path = path.parent
    room = os.statvfs(path)
    free_bytes, problem, rate, locks = room.f_bavail * room.f_frsize, "", 0.0, None
    try:
        with _file_in(path) as name:
            locks = has_locks(name)
            rate = write_rate(name, min(_MOST_BYTES, int(_FREE_SHARE * free_bytes)))
    except OSError as error:
        problem = error.strerror or str(error)
    return FileSystem(
        path=path,
        mount=mount_of(path, _mounts()),
        free_bytes=free_bytes,
        free_files=room.f_favail if room.f_files else None,
        problem=problem,
        bytes_per_s=rate,
        locks=locks,
    )


def mount_of(path: Path, mounts: str) -> Mount:
    """The mount that a path lies on.

    Args:
        path: absolute and without links.
        mounts: contents of /proc/self/mounts; what is mounted last counts.
    """
    found = Mount(device="", point="/", kind="unknown")
    for line in mounts.splitlines():
        device, point, kind, *_ = [_plain(field) for field in line.split(" ")] + ["", ""]
        if path.is_relative_to(point) and len(point) >= len(found.point):
            found = Mount(device=device, point=point, kind=kind)
    return found


def write_rate(name: Path, most_bytes: int) -> float:
    """Write to a file and flush it to the disk, for three seconds at most.

    Returns:
        Bytes a second; 0 where there is no room to tell.
    """
    # Not compressible, as weights are not.
    block = os.urandom(_FIRST_BLOCK)
    written, seconds, length = 0, 0.0, _FIRST_BLOCK
    with name.open("wb", buffering=0) as file:
        while written + length <= most_bytes and seconds < _MOST_SECONDS:
            data = block * (length // _FIRST_BLOCK)
            started = time.monotonic()
            file.write(data)
            os.fsync(file.fileno())
            took = time.monotonic() - started
            written, seconds = written + length, seconds + took
            if 2 * took < _MOST_SECONDS - seconds:
                length = min(2 * length, _LARGEST_BLOCK)
            elif took > _MOST_SECONDS - seconds:
                break
    return written / seconds if seconds else 0.0


def has_locks(name: Path) -> bool:
    """Whether a lock on a file keeps a second one out."""
    with name.open("ab") as first, name.open("ab") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextmanager
def _file_in(directory: Path) -> Iterator[Path]:
    number, name = tempfile.mkstemp(prefix=_PREFIX, dir=directory)
    os.close(number)
    try:
        yield Path(name)
    finally:
        with suppress(OSError):
            os.unlink(name)


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text()
    except OSError:
        return ""


def _plain(field: str) -> str:
    """A field of /proc/self/mounts, which writes spaces and the like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)
