"""Which checkpoint a path means; nothing here imports torch."""

from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import MANIFEST
from mempar.runtime.run_dir import RunDir


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path means.

    Args:
        path: a checkpoint (a run's checkpoints/step_XXXXXXXX directory, or one that was converted), or a run's
            directory, for its newest whole checkpoint.

    Raises:
        ConfigError: when it is neither.
    """
    if (path / MANIFEST).is_file():
        return path
    directory = RunDir(path)
    newest = directory.latest_checkpoint()
    if newest is not None:
        return newest
    if not path.exists():
        why = "there is nothing of this name"
    elif directory.config.is_file():
        why = "this run has saved no checkpoint yet"
    elif (path / "config.json").is_file():
        why = "it looks like a model of Hugging Face's: `mempar convert` makes a checkpoint of it"
    else:
        why = f"it holds neither {MANIFEST} nor checkpoints"
    raise ConfigError(
        f"{path} is no checkpoint: {why}; a checkpoint is a run's checkpoints/step_XXXXXXXX directory, and a run's own "
        "directory stands for its newest; name one of these."
    )
