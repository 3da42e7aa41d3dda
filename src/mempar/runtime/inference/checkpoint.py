"""Which checkpoint a path means; nothing here imports torch."""

import errno
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import MANIFEST, not_read
from mempar.runtime.checkpoint.retention import checkpoints_in
from mempar.runtime.run_dir import RunDir


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path means.

    Args:
        path: a checkpoint (a run's checkpoints/step_XXXXXXXX directory, or one that was converted), or a run's
            directory, for its newest whole checkpoint.

    Raises:
        ConfigError: when it is neither.
        CheckpointError: when it cannot be looked into.
    """
    try:
        found = _newest(path)
        if found is not None:
            return found
        why = _why_none(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise not_read(path, error) from None
        why = "no file has so long a name"
    raise ConfigError(
        f"{path} is no checkpoint: {why}; a checkpoint is a run's checkpoints/step_XXXXXXXX directory, and a run's own "
        "directory stands for its newest; name one of these."
    )


def _newest(path: Path) -> Path | None:
    return path if (path / MANIFEST).is_file() else RunDir(path).latest_checkpoint()


def _why_none(path: Path) -> str:
    if not path.exists():
        return "there is nothing of this name"
    if not path.is_dir():
        return "it is a file"
    if RunDir(path).config.is_file():
        return "this run has saved no checkpoint yet"
    if (path / "config.json").is_file():
        return "it looks like a model of Hugging Face's: `mempar convert` makes a checkpoint of it"
    if held := checkpoints_in(path):
        return f"it holds checkpoints, such as {held[-1].name}"
    return f"it holds neither {MANIFEST} nor checkpoints"
