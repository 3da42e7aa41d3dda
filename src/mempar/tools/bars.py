"""Progress bars for people: on standard error, where that is a terminal, and gone when the work is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Told how many more are done.
Advance = Callable[[int], None]
# Told what is done, of how many, and how many of them are done already; see `_begin`.
Begin = Callable[..., Advance]


@contextmanager
def bars(*columns: ProgressColumn) -> Iterator[Progress]:
    """Bars of any columns."""
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def counting_bars() -> Iterator[Begin]:
    """Bars of things that are counted.

    Yields:
        What begins one: `begin(what, total, done=0)`; it returns what is told how many more are done.
    """
    with bars(_name(), BarColumn(), MofNCompleteColumn(), TextColumn("ends in"), TimeRemainingColumn()) as progress:
        yield lambda what, total, done=0: _begin(progress, what, total, done)


@contextmanager
def byte_bars() -> Iterator[Begin]:
    """Bars of bytes, with their speed; see `counting_bars`."""
    with bars(_name(), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        yield lambda what, total, done=0: _begin(progress, what, total, done)


def _name() -> ProgressColumn:
    # Names of files are no markup, whatever brackets are in them.
    return TextColumn("{task.description}", markup=False)


def _begin(progress: Progress, what: str, total: int, done: int) -> Advance:
    task = progress.add_task(what, total=total, completed=done)
    return lambda count: progress.advance(task, count)
