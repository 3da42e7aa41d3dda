"""From a run and GPUs to ranked layouts: its own settings first, and where these fit nowhere, the least that changes.

Settings that change training are not the planner's to choose. Only when no layout of the run as it is fits are they
varied: what optimizer state takes, then the global batch too, nearest first; every plan then says what it changes, and
how many GPUs the run would need as it is. How often records are summed (`memory.deposit_bytes`) changes no more than
a layout does, the order of sums.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.config import HardwareConfig, RunConfig
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.estimate import Estimate
from mempar.runtime.estimate.check import advice
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.report import estimate_layout
from mempar.runtime.hardware import GPUS, Hardware
from mempar.tools.plan.balance import changes_of_balance
from mempar.tools.plan.layouts import skeletons
from mempar.tools.plan.search import SPARE_SHARE, Found, Plan, gib, search, smallest
from mempar.tools.plan.step_time import step_time

# Limits of records to try: none at all, and two that leave room for a lookup of the published models.
_DEPOSIT_BYTES = (0, 4 << 30, 1 << 30)
# Most often that a global batch is halved, and GPUs are doubled, in search of what would fit.
_HALVINGS, _DOUBLINGS = 4, 7


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What came of planning.

    Attributes:
        given: the run as it was asked for, in its own layout.
        own: that layout on these GPUs, settings of training as in `run`, if it fits, barely too.
        own_reason: why not.
        run: the run of the plans, changes included; its layout is the recipe's.
        num_ranks: GPUs.
        hardware: what each is, with the memory that was planned for.
        memory_note: where that is not what `mempar launch` or a description has, in words.
        found: plans, and reasons against the others.
        changes: what all plans change of the training, in words; empty for nothing.
        enough_gpus: GPUs that the run as it is would fit on, where it does not here; 0 if not known.
        nearest: where nothing fits, the memory of the layout that needs least, and what would lower it.
        advice: likewise.
    """

    given: RunConfig
    run: RunConfig
    num_ranks: int
    hardware: Hardware
    found: Found
    own: Plan | None = None
    own_reason: str = ""
    memory_note: str = ""
    changes: tuple[str, ...] = ()
    enough_gpus: int = 0
    nearest: Estimate | None = None
    advice: tuple[str, ...] = ()

    def changes_of(self, plan: Plan) -> list[str]:
        """What one of the plans changes of the training: what all do, and over which tokens it balances."""
        return [*self.changes, *changes_of_balance(self.given, plan.layout.run)]


def plan_run(given: RunConfig, num_ranks: int, hardware: Hardware, *, top: int) -> Planned:
    """Plan a run.

    Args:
        given: the run; its layout is not looked at.
        num_ranks: GPUs.
        hardware: what each is.
        top: plans wanted.

    Raises:
        ConfigError: when the sizes allow no layout at all on that number of GPUs, or these do not fill their nodes.
    """
    if num_ranks < 1:
        raise ConfigError(f"--gpus {num_ranks} plans for no GPU; a run needs at least one; give a positive number.")
    if top < 1:
        raise ConfigError(f"--top {top} asks for no plan; give a positive number.")
    vocab = given.model.vocab_size or vocab_size(given)
    hardware, memory_note = _with_sure_memory(hardware)
    meant = _for_gpus(given, hardware, num_ranks)
    if not skeletons(meant, num_ranks, hardware):
        raise _no_layout(given, num_ranks, hardware)
    if not _fills_nodes(num_ranks, hardware):
        raise ConfigError(
            f"--gpus {num_ranks} on nodes of {hardware.gpus_per_node}: all nodes of a launch have equally many ranks; "
            f"give at most {hardware.gpus_per_node}, or a multiple of it."
        )
    found = search(meant, num_ranks, hardware, vocab=vocab, top=top)
    own, own_reason = _own(meant, num_ranks, hardware, vocab)
    _take_in(own, found, hardware, top)
    as_it_is = Planned(
        given=given, run=meant, num_ranks=num_ranks, hardware=hardware, memory_note=memory_note, found=found, own=own,
        own_reason=own_reason,
    )  # fmt: skip
    if found.plans:
        return as_it_is
    enough = (1 - SPARE_SHARE) * hardware.memory_bytes

    def fits(run: RunConfig, ranks: int = num_ranks) -> bool:
        least = smallest(run, ranks, hardware, vocab=vocab, enough=enough)
        return least is not None and least.worst.total <= enough

    as_it_is = replace(as_it_is, enough_gpus=_enough_gpus(meant, num_ranks, hardware, fits))
    run = next((run for run in _variants(meant, fits) if fits(run)), None)
    if run is None:
        nearest = smallest(meant, num_ranks, hardware, vocab=vocab)
        return replace(as_it_is, nearest=nearest, advice=tuple(advice(nearest, hardware)) if nearest else ())
    own, own_reason = _own(run, num_ranks, hardware, vocab)
    found = search(run, num_ranks, hardware, vocab=vocab, top=top)
    _take_in(own, found, hardware, top)
    changes = tuple(changes_of_training(given, run))
    return replace(as_it_is, run=run, found=found, own=own, own_reason=own_reason, changes=changes)


def _with_sure_memory(hardware: Hardware) -> tuple[Hardware, str]:
    """Hardware with no more memory than its kind has, by which `mempar launch` judges; and words where they differ."""
    kind = GPUS.get(hardware.gpu)
    if kind is None or kind.memory_bytes == hardware.memory_bytes:
        return hardware, ""
    least = min(kind.memory_bytes, hardware.memory_bytes)
    note = (
        f"planned for {gib(least)} GiB: the description of {hardware.label} says {gib(hardware.memory_bytes)}, and "
        f"`mempar launch` judges by the {gib(kind.memory_bytes)} of hardware.gpu={hardware.gpu}"
    )
    return replace(hardware, memory_bytes=least), note


def changes_of_training(given: RunConfig, run: RunConfig) -> Iterator[str]:
    """What of a run's training differs, in words."""
    for name, memory in run.memories.items():
        before = given.memories[name]
        for setting in ("optimizer", "moments_dtype", "rounding"):
            if setting == "moments_dtype" and memory.optimizer == "row_adagrad":
                # It has none.
                continue
            if getattr(memory, setting) != getattr(before, setting):
                yield f"{name}.{setting}={getattr(memory, setting)} instead of {getattr(before, setting)}"
    if run.train.global_batch_size != given.train.global_batch_size:
        yield (
            f"train.global_batch_size={run.train.global_batch_size} instead of {given.train.global_batch_size} "
            f"(train.steps={run.train.steps} instead of {given.train.steps}, for as many tokens; rates and warm-up are "
            "those chosen for the larger batch)"
        )


def _variants(given: RunConfig, fits: Callable[[RunConfig], bool]) -> Iterator[RunConfig]:
    """The run as it is, then what needs less memory, the nearest first.

    Settings that do not fit with the smallest batch are not tried with larger ones.
    """
    batches = [_with_batch(given, halvings) for halvings in range(_HALVINGS + 1)]
    batches = [batch for batch in batches if batch is not None]
    if not given.memories:
        # Without tables the batch's size changes nothing that is held.
        batches = batches[:1]
    hopeful = None
    for batch in batches:
        if batch is not given and hopeful is None:
            hopeful = [
                settings
                for settings in _table_settings(given)
                if any(fits(run) for run in _with_limits(batches[-1], settings))
            ]
        for settings in _table_settings(given) if hopeful is None else hopeful:
            yield from _with_limits(batch, settings)


def _with_batch(given: RunConfig, halvings: int) -> RunConfig | None:
    """The run with its global batch halved so often, and steps for as many tokens; None where nothing is left of it."""
    size = given.train.global_batch_size >> halvings
    if not halvings or not size:
        return given if size else None
    steps = -(-given.train.steps * given.train.global_batch_size // size)
    micro = min(size, given.train.micro_batch_size)
    return replace(given, train=replace(given.train, global_batch_size=size, steps=steps, micro_batch_size=micro))


def _with_limits(run: RunConfig, settings: dict[str, Any]) -> Iterator[RunConfig]:
    """The run with settings of its tables changed, and with other limits of records."""
    changed = _with_tables(run, settings)
    if changed is None:
        return
    yield changed
    for limit in _DEPOSIT_BYTES if run.memories else ():
        other = _with_tables(changed, {"deposit_bytes": limit})
        if other is not None and limit != run.memory.deposit_bytes:
            yield other


def _table_settings(run: RunConfig) -> Iterator[dict[str, Any]]:
    """Settings of tables by how much they change, the run's own first."""
    yield {}
    if not run.memories:
        return
    memory = run.memory
    smaller: list[dict[str, Any]] = []
    if memory.rounding == "master" and run.table_dtype_of(memory) == "bf16":
        smaller.append({"rounding": "stochastic"})
    if memory.optimizer == "adamw":
        smaller = [{"optimizer": "row_adam"}, *({"optimizer": "row_adam"} | each for each in smaller)]
    if memory.optimizer != "row_adagrad" and memory.moments_dtype != "bf16":
        smaller += [{"optimizer": "row_adam", "moments_dtype": "bf16"} | each for each in ({}, *smaller[-1:])]
    if memory.optimizer != "row_adagrad":
        adagrad = {"optimizer": "row_adagrad", "moments_dtype": "float32"}
        smaller.append(adagrad)
        if memory.rounding == "master" and run.table_dtype_of(memory) == "bf16":
            smaller.append(adagrad | {"rounding": "stochastic"})
    yield from smaller


def _with_tables(run: RunConfig, settings: dict[str, Any]) -> RunConfig | None:
    """The run with a setting of all its memories changed; the run itself without any; None where its rules refuse."""
    if not settings:
        return run
    try:
        more = tuple(replace(memory, **settings) for memory in run.more_memories)
        return replace(run, memory=replace(run.memory, **settings), more_memories=more)
    except ConfigError:
        return None


def _enough_gpus(run: RunConfig, num_ranks: int, hardware: Hardware, fits: Callable[[RunConfig, int], bool]) -> int:
    """The least power-of-two multiple of some GPUs on which a run fits as it is; 0 where none was found."""
    more = (num_ranks << doublings for doublings in range(1, _DOUBLINGS + 1))
    whole = (ranks for ranks in more if _fills_nodes(ranks, hardware))
    return next((ranks for ranks in whole if fits(_for_gpus(run, hardware, ranks), ranks)), 0)


def _fills_nodes(num_ranks: int, hardware: Hardware) -> bool:
    """Whether so many ranks lie on one node, or fill several."""
    return num_ranks <= hardware.gpus_per_node or num_ranks % hardware.gpus_per_node == 0


def _for_gpus(run: RunConfig, hardware: Hardware, num_ranks: int) -> RunConfig:
    """The run, meant for so many of these devices."""
    return replace(run, hardware=HardwareConfig(gpu=hardware.gpu, gpus=num_ranks if hardware.gpu else 0))


def _own(run: RunConfig, num_ranks: int, hardware: Hardware, vocab: int) -> tuple[Plan | None, str]:
    """The layout that a run brings along, or why it is none here."""
    try:
        layout = Layout.of(run, num_ranks, vocab)
    except ConfigError as error:
        return None, str(error)
    needed = estimate_layout(layout, num_ranks)
    if not needed.fits(hardware):
        return None, f"it needs {gib(needed.worst.total)} of {gib(hardware.memory_bytes)} GiB"
    return Plan(layout=layout, estimate=needed, time=step_time(layout, hardware)), ""


def _take_in(own: Plan | None, found: Found, hardware: Hardware, top: int) -> None:
    """Put a recipe's own layout first where it has room and is faster than all found, which layouts.py lists."""
    if own is None or not own.has_room(hardware):
        return
    first = found.plans[0] if found.plans else None
    if first is None or not first.has_room(hardware) or own.time.seconds < first.time.seconds:
        found.plans = [own, *found.plans][:top]


def _no_layout(run: RunConfig, num_ranks: int, hardware: Hardware) -> ConfigError:
    model, batch = run.model, run.train.global_batch_size
    return ConfigError(
        f"--gpus {num_ranks} allows no layout of {run.name}: they divide into tp x cp x pp x dp with tp among the "
        f"divisors of {hardware.gpus_per_node} GPUs of a node and of model.num_attention_heads="
        f"{model.num_attention_heads}, pp among those of model.num_layers={model.num_layers}, and dp of at most "
        f"train.global_batch_size={batch}; give another number of GPUs."
    )
