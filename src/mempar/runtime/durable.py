"""Files that outlast a crash of the machine: what is renamed must be on the disk first, and then the name itself.

A rename alone is atomic to whoever looks, but file systems may write it before the content: after a loss of power the
file is there and empty. Nothing here imports torch.
"""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: whoever reads it, at any time, finds what was there before or all of this.

    Args:
        path: the file; `path` with `.aside` at its end is used on the way.
        content: of the file.

    Raises:
        OSError: when it cannot be written; what was there before is still there.
    """
    aside = path.with_name(f"{path.name}.aside")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make what was written to a file, or the names in a directory, outlast a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
