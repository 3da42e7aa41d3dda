"""The formats that are converted from and to, and how a directory of each is known."""

from collections.abc import Sequence
from pathlib import Path

from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.checkpoint.manifest import MANIFEST
from mempar.runtime.overrides import to_yaml
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.deepspeed import DeepSpeedSource, is_universal, plan_deepspeed
from mempar.tools.convert.hf import HfSource, plan_hf
from mempar.tools.convert.layout import in_layout
from mempar.tools.convert.plan import Plan
from mempar.tools.convert.selection import Weights
from mempar.tools.convert.source import Source
from mempar.tools.convert.to_mempar import ToMempar

FORMATS = ("mempar", "hf", "deepspeed")


def open_source(root: Path) -> Source:
    """Open a checkpoint of mempar's, a universal checkpoint of DeepSpeed's, or a model of transformers'.

    Raises:
        CheckpointError: when it is none of them, or damaged.
    """
    if (root / MANIFEST).exists():
        return CheckpointSource(root)
    if is_universal(root):
        return DeepSpeedSource(root)
    if (root / "config.json").exists():
        # Whatever it had behind it, there is no optimizer's state to go on with.
        return Weights(HfSource(root))
    raise CheckpointError(
        f"{root} is nothing that can be converted: it has no manifest.json (a checkpoint), no latest_universal "
        "(DeepSpeed's) and no config.json (transformers'); name a checkpoints/step_XXXXXXXX directory of a run, or one "
        "that another tool wrote."
    )


def plan_to(form: str, source: Source, layout: Sequence[str], memory_bytes: int) -> tuple[Plan, str]:
    """Plan a conversion.

    Args:
        form: one of `FORMATS`.
        source: what is converted.
        layout: `KEY=VALUE` of the parallel layout, for a checkpoint of mempar's.
        memory_bytes: that a job may take.

    Returns:
        The plan, and a text of everything beside the source that decides what it makes.

    Raises:
        ConfigError: for what is not known or does not fit.
        CheckpointError: when the source holds what the format cannot.
    """
    if form not in FORMATS:
        raise ConfigError(f"--to {form} is not known; it is one of {', '.join(FORMATS)}; use one of these.")
    if form == "mempar":
        run, world = in_layout(source.run, layout)
        return ToMempar(source, run, world).plan(memory_bytes), f"{world}\n{to_yaml(run)}"
    if layout:
        raise ConfigError(
            f"{' '.join(layout)} with --to {form}: its files are the same for every layout; only checkpoints of "
            "mempar's are cut for one; drop it."
        )
    plan = plan_hf if form == "hf" else plan_deepspeed
    return plan(source, memory_bytes=memory_bytes), ""
