"""The parallel layout that a conversion is asked for: `tp=2 pp=4 mp=8 mp_rows=2`."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace

from mempar.errors import ConfigError
from mempar.runtime.config import ParallelConfig, RunConfig
from mempar.runtime.overrides import override
from mempar.runtime.placement import place, resolve

_MOST_RANKS = 1 << 16
_KEYS = tuple(field.name for field in fields(ParallelConfig))


def in_layout(run: RunConfig, assignments: Sequence[str]) -> tuple[RunConfig, int]:
    """Put a run in another layout.

    Args:
        run: as it was.
        assignments: `KEY=VALUE`, keys as in the section `parallel` and `dp`; sizes that are not given are 1, or the
            fewest that the others need. The kind of the dense optimizer stays as it was unless it is given.

    Returns:
        The resolved run and its number of ranks.

    Raises:
        ConfigError: for keys that are not known, and sizes that do not fit each other or the model.
    """
    given: dict[str, str] = {}
    for assignment in assignments:
        key, mark, value = assignment.partition("=")
        if not mark or key not in (*_KEYS, "dp"):
            near = difflib.get_close_matches(key, (*_KEYS, "dp"), n=3)
            meant = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join((*_KEYS, 'dp'))}."
            raise ConfigError(f"{assignment} is no size of a layout; it is given as KEY=VALUE, e.g. tp=2; {meant}")
        if key in given:
            raise ConfigError(f"{key} is given twice, as {given[key]} and {value}; a layout has one; drop one of them.")
        given[key] = value
    replicas = given.pop("dp", None)
    plain = replace(run, parallel=ParallelConfig(distributed_optimizer=run.parallel.distributed_optimizer))
    # Both at once, so that neither is refused for want of the other.
    several = given.get("tp", "1") != "1"
    if several and "sequence_parallel" not in given and (run.parallel.sequence_parallel or run.moe.enabled):
        given["sequence_parallel"] = "true"
    wanted = override(plain, [f"parallel.{key}={value}" for key, value in given.items()])
    world = _world(wanted, replicas)
    if world > _MOST_RANKS:
        raise ConfigError(
            f"{' '.join(assignments)} takes {world} ranks; at most {_MOST_RANKS} are laid out; use fewer."
        )
    wanted = resolve(wanted, world)
    place(wanted, world)
    return wanted, world


def _world(run: RunConfig, replicas: str | None) -> int:
    sizes = run.parallel
    if replicas is None:
        return sizes.smallest_world
    if not replicas.isdecimal() or not int(replicas):
        raise ConfigError(f"dp={replicas} is no number of replicas; it counts ranks; use 1 or more.")
    return int(replicas[:9]) * sizes.tp * sizes.cp * sizes.pp
