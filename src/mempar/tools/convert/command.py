"""`mempar convert`: what is asked for, checked and planned, shown, and carried out."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import OPTIMIZER
from mempar.tools.convert.conversion import Conversion, ConversionError, identity_of
from mempar.tools.convert.formats import open_source, plan_to
from mempar.tools.convert.selection import Weights
from mempar.tools.convert.source import Source
from mempar.tools.convert.with_memory import WithMemory

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]i?B|B|)")
_UNITS = {"": 1, "B": 1, **{f"{letter}{i}B": (1024 if i else 1000) ** place
                            for place, letter in enumerate("KMGT", 1) for i in ("i", "")}}  # fmt: skip


def convert(
    source: Path,
    destination: Path,
    assignments: list[str],
    *,
    form: str,
    weights_only: bool,
    dtype: str,
    max_memory: str,
    workers: int | None,
    resume: bool,
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Convert a checkpoint to another layout or format.

    Args:
        source: the directory of a checkpoint, of mempar's or another tool's.
        destination: the directory to make.
        assignments: `KEY=VALUE` of the layout, and `memory.KEY=VALUE` of memory layers to be added.
        form: one of `formats.FORMATS`.
        weights_only: leave the state of optimizers out.
        dtype: to cast weights to; empty leaves them as they are.
        max_memory: that jobs may take together, e.g. `4GiB`.
        workers: jobs at a time; None takes two a core, as far as memory reaches.
        resume: go on with a conversion that was begun.
        dry_run: show the plan and stop.
        say: prints a line.

    Raises:
        ConfigError: for bad input, before anything is written.
        CheckpointError: when the source is none, or damaged.
    """
    _check(destination, weights_only=weights_only, dtype=dtype, workers=workers)
    # While some wait for the disk, others turn rows round.
    count, limit = workers or 2 * len(os.sched_getaffinity(0)), parse_size(max_memory)
    added = [assignment for assignment in assignments if assignment.startswith("memory.")]
    layout = [assignment for assignment in assignments if assignment not in added]
    try:
        tensors = _tensors(source, added, weights_only=weights_only, dtype=dtype)
        plan, what = plan_to(form, tensors, layout, limit // count)
        conversion = Conversion(
            plan=plan,
            identity=identity_of(tensors.identity, form, what, *(job.key for job in plan.jobs)),
            source=source,
            destination=destination,
            workers=count,
            max_memory=limit,
        )
        say(_table(conversion))
    except OSError as error:
        raise ConversionError(
            f"{source} cannot be converted to {destination}: {error}; nothing was written; see to what it names."
        ) from None
    if dry_run:
        return
    conversion.run(resume=resume)
    say(f"{destination} is whole: {plan.what}")


def _check(destination: Path, *, weights_only: bool, dtype: str, workers: int | None) -> None:
    if dtype and not weights_only:
        raise ConfigError(
            f"--dtype {dtype} without --weights-only: the state of optimizers belongs to weights in their precision; "
            "add --weights-only, or leave the precision as it is."
        )
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} does nothing; at least one does; raise it.")
    if not destination.name:
        raise ConfigError(f"{destination} has no name of its own to make; name a directory that is not there yet.")


def parse_size(text: str) -> int:
    """Bytes of a text such as `4GiB` or `500MB`.

    Raises:
        ConfigError: when it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no amount of memory; it is a number and a unit; write 4GiB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2]])


def _tensors(root: Path, added: list[str], *, weights_only: bool, dtype: str) -> Source:
    """The source, what is left of it, and what is added to it."""
    source = open_source(root)
    has_state = any(record.kind == OPTIMIZER for record in source.tensors.values())
    if added and has_state and not weights_only:
        raise ConfigError(
            f"{' '.join(added)} adds memory layers to {root}, which holds the state of optimizers; what is added has "
            "none, so training begins anew; add --weights-only."
        )
    if weights_only:
        source = Weights(source, dtype)
    return WithMemory(source, added) if added else source


def _table(conversion: Conversion) -> str:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in conversion.summary():
        table.add_row(name, text)
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
