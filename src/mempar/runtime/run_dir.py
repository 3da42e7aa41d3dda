"""The directory of a run: what lies in it, and who may write to it.

    config.yaml          the resolved run
    layout.json          each rank's groups, its slice of the table, bytes allocated
    metrics.jsonl        one object a step
    checkpoints/         step_XXXXXXXX directories, whole or not at all
    events.out.tfevents* TensorBoard
    lock, lock.ranks     held while the run goes on (lock.py)
    ranks/               signs of life while it does, and what ranks left behind if it failed

Nothing here imports torch.
"""

import dataclasses
import json
from pathlib import Path

from mempar.errors import CheckpointError, ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig
from mempar.runtime.lock import LOCK_NAME, RANKS_LOCK_NAME
from mempar.runtime.overrides import load_yaml, to_yaml

# What must be equal for a run to be the same run: the model, the numbers it is trained with, its data.
_IDENTITY: dict[str, tuple[str, ...] | None] = {
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
    "data": ("corpus", "paths", "weights", "tokenizer"),
}
# How a run is computed, not what: may change when it is continued, as the parallel layout may.
_FREE = ("merge_duplicates",)
# What a checkpoint's tensors depend on.
_SHAPES: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "memory": (
        "enabled",
        "variant",
        "layers",
        "beside",
        "num_subkeys",
        "heads",
        "key_dim",
        "value_dim",
        "qk_norm",
        "scalar_gate",
    ),
    "moe": ("num_experts", "ffn_hidden_size", "layers"),
}


class RunDir:
    """Paths of one run's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.layout = root / "layout.json"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.ranks = root / "ranks"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def latest_checkpoint(self, before: int | None = None) -> Path | None:
        """The checkpoint of the highest step, below `before` where that is given; None when there is none."""
        whole = [path for path in self.checkpoints.glob("step_????????") if (path / "meta.json").is_file()]
        return max((path for path in whole if before is None or path < self.checkpoint(before)), default=None)


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
        what = "holds a run already" if RunDir(root).config.exists() else "exists and is not an empty directory"
        raise ConfigError(
            f"{root} {what}; a new run needs a directory of its own; continue that run with --resume, or choose "
            "another --out."
        )


def open_existing(root: Path, run: RunConfig) -> RunDir:
    """Open a run's directory to continue it; an absent one is made.

    Raises:
        ConfigError: when it holds another run; the message names the settings that differ.
    """
    directory = RunDir(root)
    if not directory.config.exists():
        return open_new(root, run)
    differing = _differences(load_yaml(directory.config), run, _IDENTITY)
    if differing:
        raise ConfigError(
            f"{root} holds another run: {'; '.join(differing)}; --resume continues the same model, data and batch; "
            "give the same settings, or start a new run in another --out."
        )
    _write_config(directory, run)
    return directory


def read_meta(checkpoint: Path, run: RunConfig) -> dict:
    """Read a checkpoint's description and check that it is of this run's model.

    Raises:
        CheckpointError: when it is missing, unreadable, of another format or of another model.
    """
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        saved = load_yaml(checkpoint / "config.yaml")
        version = meta["format"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: it has no meta.json or config.yaml; name a checkpoints/step_XXXXXXXX "
            "directory of a run."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}/meta.json cannot be read ({error}); it is damaged; use another checkpoint."
        ) from None
    if version != 1:
        raise CheckpointError(f"{checkpoint} has format {version}; this version reads format 1; use a newer mempar.")
    differing = _differences(saved, run, _SHAPES)
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(differing)}; its tensors have other shapes or meanings; "
            "use a recipe with the checkpoint's settings."
        )
    if saved.parallel.distributed_optimizer != run.parallel.distributed_optimizer:
        raise CheckpointError(
            f"{checkpoint} was saved with parallel.distributed_optimizer={saved.parallel.distributed_optimizer}, this "
            f"run sets {run.parallel.distributed_optimizer}; their optimizer states are laid out differently; set it "
            "as it was."
        )
    if saved.train.dtype != run.train.dtype:
        raise CheckpointError(
            f"{checkpoint} was saved with train.dtype={saved.train.dtype}, this run sets {run.train.dtype}; "
            "states are kept in other precisions; set it as it was."
        )
    before, now = _table_state(saved), _table_state(run)
    # A setting that only one of them has hangs on another one that differs.
    shared = [key for key in now if key in before]
    differing = [f"{key} is {before[key]} there and {now[key]} here" for key in shared if before[key] != now[key]]
    if differing:
        raise CheckpointError(
            f"{checkpoint} keeps another state of the table: {'; '.join(differing)}; it cannot be turned into this "
            "one; set them as they were."
        )
    return meta


def describe_checkpoint(run: RunConfig, checkpoint: Path, meta: dict) -> None:
    """Write what `read_meta` reads, last of all files."""
    (checkpoint / "config.yaml").write_text(to_yaml(run))
    (checkpoint / "meta.json").write_text(json.dumps({"format": 1, **meta}, indent=1) + "\n")


def _table_state(run: RunConfig) -> dict[str, str | int]:
    """The settings that decide which tensors hold tables and their optimizers' state."""
    settings: dict[str, str | int] = {}
    for name, memory in run.memories.items():
        dtype = run.table_dtype_of(memory)
        settings |= {f"{name}.dtype": dtype, f"{name}.moments_dtype": memory.moments_dtype}
        if dtype == "bf16":
            # Without a master, either rounding goes on from the same values.
            settings[f"{name}.rounding"] = "master" if memory.rounding == "master" else "stochastic or nearest"
        # adamw and row_adam keep the same moments.
        settings[f"{name}.optimizer"] = "row_adagrad" if memory.optimizer == "row_adagrad" else "adamw or row_adam"
        if memory.optimizer == "row_adagrad":
            settings[f"{name}.column_tile"] = memory.column_tile
    return settings


def _write_config(directory: RunDir, run: RunConfig) -> None:
    try:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
        aside = directory.config.with_suffix(".partial")
        aside.write_text(to_yaml(run))
        aside.replace(directory.config)
    except OSError as error:
        raise ConfigError(
            f"{directory.root} cannot be written ({error.strerror}); a run needs a writable directory; choose "
            "another --out."
        ) from None


def _differences(saved: RunConfig, run: RunConfig, compared: dict[str, tuple[str, ...] | None]) -> list[str]:
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
