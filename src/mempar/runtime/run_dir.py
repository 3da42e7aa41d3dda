"""The directory of a run: what lies in it, and who may write to it.

    config.yaml          the resolved run
    layout.json          each rank's groups, its slice of the table, bytes allocated
    metrics.jsonl        one object a step
    checkpoints/         step_XXXXXXXX directories, whole or not at all
    events.out.tfevents* TensorBoard
    lock, lock.ranks     held while the run goes on (lock.py)
    ranks/               signs of life while it does, and what ranks left behind if it failed
    slots/               slots that the first steps of each launch read, where train.trace_steps asks for them
    launch/              what the run came from: command, commit, versions; what `mempar launch` submitted

Nothing here imports torch.
"""

import dataclasses
from pathlib import Path

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.checkpoint.retention import checkpoints_in, step_of
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.lock import LOCK_NAME, RANKS_LOCK_NAME
from mempar.runtime.overrides import load_yaml, to_yaml
from mempar.runtime.slot_file import FOLDER

# Settings that are compared, by section; None for all of a section.
Compared = dict[str, tuple[str, ...] | None]
# What must be equal for a run to be the same run: the model, the numbers it is trained with, its data.
_IDENTITY: Compared = {
    "model": None,
    # What is watched or compared does not change what is trained.
    "memory": tuple(
        setting.name
        for setting in dataclasses.fields(MemoryConfig)
        if setting.name not in ("usage_interval", "check_interval")
    ),
    "moe": None,
    "optim": None,
    "train": ("seed", "global_batch_size", "seq_length", "dtype"),
    # Where data lie may change; what is in them says the checkpoint (see checkpoint/accept.py).
    "data": ("corpus", "weights", "tokenizer"),
}
# How a run is computed, not what: may change when it is continued, as the parallel layout may.
_FREE = ("merge_duplicates",)


class RunDir:
    """Paths of one run's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.layout = root / "layout.json"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.ranks = root / "ranks"
        self.slots = root / FOLDER
        self.launch = root / "launch"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def signs(self, attempt: str = "") -> Path:
        """Where the ranks of one start of the run give signs of life; one of several nodes has a name."""
        return self.ranks / attempt if attempt else self.ranks

    def latest_checkpoint(self, before: int | None = None) -> Path | None:
        """The checkpoint of the highest step, below `before` where that is given; None when there is none."""
        whole = checkpoints_in(self.checkpoints)
        return next((path for path in reversed(whole) if before is None or step_of(path) < before), None)


def open_new(root: Path, run: RunConfig) -> RunDir:
    """Make the directory of a new run.

    Raises:
        ConfigError: when something else lies there.
    """
    check_free(root)
    directory = RunDir(root)
    _write_config(directory, run)
    return directory


def check_free(root: Path) -> None:
    """Refuse a directory in which something lies already, beside locks."""
    locks = (LOCK_NAME, RANKS_LOCK_NAME)
    if root.exists() and (not root.is_dir() or any(path.name not in locks for path in root.iterdir())):
        is_run = RunDir(root).config.exists()
        what = "holds a run already" if is_run else "exists and is not an empty directory"
        remedy = "continue that run with --resume, or choose another --out" if is_run else "choose another --out"
        raise ConfigError(f"{root} {what}; a new run needs a directory of its own; {remedy}.")


def open_existing(root: Path, run: RunConfig) -> RunDir:
    """Open a run's directory to continue it; an absent one is made.

    Raises:
        ConfigError: when it holds another run; the message names the settings that differ.
    """
    directory = RunDir(root)
    if not directory.config.exists():
        return open_new(root, run)
    check_same_run(root, run)
    _write_config(directory, run)
    return directory


def check_same_run(root: Path, run: RunConfig) -> None:
    """Refuse to continue what a directory holds as another run; the message names the settings that differ."""
    differing = differences(load_yaml(RunDir(root).config), run, _IDENTITY)
    if differing:
        raise ConfigError(
            f"{root} holds another run: {'; '.join(differing)}; --resume continues the same model, data, batch and "
            "optimizer; give the same settings, or start a new run in another --out."
        )


def _write_config(directory: RunDir, run: RunConfig) -> None:
    try:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
        replace_file(directory.config, to_yaml(run).encode())
    except OSError as error:
        raise ConfigError(
            f"{directory.root} cannot be written ({error.strerror}); a run needs a writable directory with "
            "room; make room there, or choose another --out."
        ) from None


def differences(saved: RunConfig, run: RunConfig, compared: Compared) -> list[str]:
    """Describe the settings in which two runs differ, of those that are compared."""
    differing = []
    if len(saved.more_memories) != len(run.more_memories):
        return [f"more_memories are {len(saved.more_memories)} there and {len(run.more_memories)} here"]
    pairs = [(section, getattr(saved, section), getattr(run, section), names) for section, names in compared.items()]
    pairs += [
        (f"more_memories.{place}", before, now, compared["memory"])
        for place, (before, now) in enumerate(zip(saved.more_memories, run.more_memories, strict=True))
    ]
    for section, before, now, names in pairs:
        for name in names or [setting.name for setting in dataclasses.fields(now)]:
            if name not in _FREE and getattr(before, name) != getattr(now, name):
                differing.append(f"{section}.{name} is {getattr(before, name)} there and {getattr(now, name)} here")
    return differing
