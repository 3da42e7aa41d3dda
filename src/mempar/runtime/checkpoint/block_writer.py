"""Large blocks written to a file past the page cache, where the file system can: `O_DIRECT`.

A table's block is written once and not read again soon. Through the page cache it is copied, costs a page for each of
its 4 KiB, drives out what others read, and is written back by a thread of the kernel's that takes a core: 2 GiB take
1.2 to 2.2 s with their fsync, and .6 s directly (ext4 on a virtual disk, AMD EPYC, 2026-11). What is not aligned, and
all of it where the file system refuses, goes through the cache.
"""

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

# Of addresses, places in a file and lengths: a page, which is a multiple of what disks ask for.
ALIGNMENT = 4096


def aligned_empty(num_bytes: int) -> Tensor:
    """`[num_bytes] uint8`, not filled, that begins at a page."""
    room = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    first = -room.data_ptr() % ALIGNMENT
    return room[first : first + num_bytes]


class BlockWriter:
    """A file that is there and is written into, by one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._direct: int | None = None
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def write(self, block: Tensor, start: int) -> None:
        """Write a contiguous tensor on the CPU at a place in the file.

        Raises:
            OSError: when it cannot be written.
        """
        data = as_bytes(block)
        if self._direct is not None and not (start | len(data) | block.data_ptr()) % ALIGNMENT:
            try:
                write_at(self._direct, data, start)
                return
            except OSError as error:
                # Some file systems say so only now.
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct)
                self._direct = None
        write_at(self._buffered(), data, start)

    def _buffered(self) -> int:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY)
        return self._file

    def sync(self) -> None:
        """Bring everything to the disk."""
        for file in (self._file, self._direct):
            if file is not None:
                os.fsync(file)

    def close(self) -> None:
        """Let go of the file."""
        for file in (self._file, self._direct):
            if file is not None:
                os.close(file)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]


def write_at(file: int, data: bytes | memoryview, start: int) -> None:
    """Write all of a buffer at a place in a file."""
    view = memoryview(data)
    while len(view):
        # The kernel writes at most 2 GiB at a time.
        count = os.pwrite(file, view, start)
        view, start = view[count:], start + count
