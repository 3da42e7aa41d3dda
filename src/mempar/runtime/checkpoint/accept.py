"""Whether a run can go on from a checkpoint; nothing here imports torch."""

from pathlib import Path

from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.checkpoint.manifest import CONFIG, Manifest, checksum, damaged, not_read, read_manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import data_identity, identity_differences
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import Compared, differences

# In a checkpoint's description: what was in the data of the run.
DATA = "data"
# What a checkpoint's tensors depend on.
_SHAPES: Compared = {
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


def open_checkpoint(checkpoint: Path, run: RunConfig) -> Manifest:
    """Read a checkpoint's manifest and check that the run can go on from it.

    Raises:
        CheckpointError: when it is missing, damaged, of another format or of another model.
    """
    manifest = read_manifest(checkpoint)
    check_config(checkpoint, read_config(manifest), run, weights_only=manifest.weights_only)
    return manifest


def check_same_data(manifest: Manifest, run: RunConfig) -> None:
    """Refuse to continue a run with other data, wherever they lie.

    Raises:
        ConfigError: naming what differs.
    """
    differing = identity_differences(manifest.about.get(DATA, {}), data_identity(run))
    if differing:
        raise ConfigError(
            f"{manifest.root} was written by a run on other data: {'; '.join(differing)}; --resume continues the same "
            "data at the sample where the run stopped; repeat the settings of data that it was started with, or "
            "start a new run with --from."
        )


def read_config(manifest: Manifest) -> RunConfig:
    """The run that wrote a checkpoint.

    Raises:
        CheckpointError: when that cannot be read.
    """
    path = manifest.root / CONFIG
    record = manifest.files.get(CONFIG)
    try:
        whole = record is not None and [checksum(path.read_bytes())] == [piece.checksum for piece in record.pieces]
    except OSError as error:
        raise not_read(path, error) from None
    if not whole:
        raise damaged(path, "its checksum is not that of what was written")
    try:
        return load_yaml(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} is not of this version of mempar: {error}") from None


def check_config(checkpoint: Path, saved: RunConfig, run: RunConfig, *, weights_only: bool = False) -> None:
    """Check that a run has the tensors that a checkpoint holds.

    Args:
        checkpoint: where it is.
        saved: the run that wrote it.
        run: the run that would go on from it.
        weights_only: whether it has no state of an optimizer, so that the run may have any.

    Raises:
        CheckpointError: naming what differs.
    """
    differing = differences(saved, run, _SHAPES)
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(differing)}; its tensors have other shapes or meanings; "
            "use a recipe with the checkpoint's settings."
        )
    if saved.train.dtype != run.train.dtype:
        raise CheckpointError(
            f"{checkpoint} was saved with train.dtype={saved.train.dtype}, this run sets {run.train.dtype}; "
            "states are kept in other precisions; set it as it was."
        )
    before, now = _table_state(saved), _table_state(run)
    if weights_only:
        before = {key: value for key, value in before.items() if key.endswith(".dtype")}
    # A setting that only one of them has hangs on another one that differs.
    shared = [key for key in now if key in before]
    differing = [f"{key} is {before[key]} there and {now[key]} here" for key in shared if before[key] != now[key]]
    if differing:
        raise CheckpointError(
            f"{checkpoint} keeps another state of the table: {'; '.join(differing)}; it cannot be turned into this "
            "one; set them as they were."
        )


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
