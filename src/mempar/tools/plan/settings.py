"""A plan as what makes a run take it: KEY=VALUE, as `mempar train` and `mempar launch` read them, and the nodes."""

import dataclasses
from typing import Any

from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig

# Sections whose settings a plan may change.
_SECTIONS = ("parallel", "train", "memory", "hardware")


def settings_of(given: RunConfig, planned: RunConfig) -> list[str]:
    """What to pass beside a recipe's name so that it runs as planned.

    Args:
        given: the run as the recipe and the user's own overrides make it.
        planned: the run of a plan.
    """
    found = [
        f"{section}.{setting.name}={_text(getattr(getattr(planned, section), setting.name))}"
        for section in _SECTIONS
        for setting in dataclasses.fields(getattr(planned, section))
        if getattr(getattr(planned, section), setting.name) != getattr(getattr(given, section), setting.name)
    ]
    if planned.more_memories != given.more_memories:
        found.append(f"more_memories=[{', '.join(_memory(memory) for memory in planned.more_memories)}]")
    return found


def launch_options(num_ranks: int, gpus_per_node: int) -> list[str]:
    """Options that make `mempar launch` start so many ranks, on whole nodes where one does not do."""
    nodes, per_node = -(-num_ranks // gpus_per_node), min(num_ranks, gpus_per_node)
    place = ["--on", "slurm"] if nodes > 1 else []
    return ["--nodes", str(nodes), "--nproc-per-node", str(per_node), *place]


def _memory(memory: MemoryConfig) -> str:
    """A memory as YAML in one line, what differs from the defaults alone."""
    default = MemoryConfig()
    names = [setting.name for setting in dataclasses.fields(memory)]
    changed = {name: getattr(memory, name) for name in names if getattr(memory, name) != getattr(default, name)}
    return "{" + ", ".join(f"{name}: {_text(value)}" for name, value in changed.items()) + "}"


def _text(value: Any) -> str:
    """A value as OmegaConf reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value)
