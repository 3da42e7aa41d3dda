"""Which checkpoints of a run there are, and which may go. Nothing here imports torch."""

import os
import re
import shutil
from pathlib import Path

from mempar.runtime.checkpoint.manifest import MANIFEST

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
    """Delete a checkpoint, if it is there: it has lost its name before it loses its first file."""
    gone = path.with_name(path.name + _DISCARDED)
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed run left behind: checkpoints that it was writing or deleting."""
    for suffix in (PARTIAL, _DISCARDED):
        for left in directory.glob(f"step_*{suffix}"):
            shutil.rmtree(left)
