"""Which checkpoints of a run there are, and which may go. Nothing here imports torch."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from mempar.runtime.checkpoint.manifest import MANIFEST
from mempar.runtime.durable import sync

# What is being written, and what is being deleted, has another name than a checkpoint.
PARTIAL, _DISCARDED = ".partial", ".discarded"
_NAME = re.compile(r"step_\d{8,}")


def checkpoints_in(directory: Path) -> list[Path]:
    """The whole checkpoints in a directory, in the order of their steps."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def prune(directory: Path, keep: int, before: int) -> None:
    """Delete all but the newest `keep` checkpoints, and but the newest of those before step `before`."""
    whole = checkpoints_in(directory)
    good = [path for path in whole if step_of(path) < before][-1:]
    for path in whole[:-keep]:
        if path not in good:
            discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint, if it is there: it has lost its name before it loses its first file.

    What cannot be deleted (somebody still reads it, over a network) is left under another name for the next time.
    """
    gone = path.with_name(path.name + _DISCARDED)
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists() and not gone.exists():
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Give a directory its name; what had the name goes when the new one has it.

    Raises:
        OSError: when it cannot be renamed; what had the name has it still.
    """
    old = path.with_name(path.name + _DISCARDED)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    # It is there; some file systems do not sync directories.
    with contextlib.suppress(OSError):
        sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: Path, but_must: Path) -> None:
    """Delete what a killed run left behind: checkpoints that it was writing or deleting.

    Args:
        directory: of the checkpoints.
        but_must: has to go; others stay if they cannot be deleted.

    Raises:
        OSError: when it cannot be deleted.
    """
    if but_must.exists():
        shutil.rmtree(but_must)
    for suffix in (PARTIAL, _DISCARDED):
        for left in directory.glob(f"step_*{suffix}"):
            shutil.rmtree(left, ignore_errors=True)
