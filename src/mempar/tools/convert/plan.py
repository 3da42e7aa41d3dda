"""What a conversion has to do: jobs, each done whole or done again, and what comes before and after them.

A format that checkpoints are converted to is a function that makes a `Plan`; whoever carries it out (conversion.py)
knows nothing of formats. Nothing is written while a plan is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Told how many more bytes were written.
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a conversion that depends on no other one.

    Attributes:
        key: its name, the same whenever this conversion is planned again.
        bytes_read: of the source.
        bytes_written: by it.
        memory_bytes: that it takes at its peak.
        run: does it in a directory, whatever an earlier attempt left there, brings what it wrote to the disk and
            returns what `Plan.finish` needs to know of it, as plain JSON.
    """

    key: str
    bytes_read: int
    bytes_written: int
    memory_bytes: int
    run: Callable[[Path, Advance], Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion.

    Attributes:
        what: one line that says what it makes.
        jobs: in the order in which they are begun; several run at a time.
        prepare: makes directories, and files that several jobs write into; called whenever a conversion is begun or
            continued.
        finish: describes what the jobs wrote, given their results by their keys; called once, after all of them.
    """

    what: str
    jobs: list[Job]
    prepare: Callable[[Path], None]
    finish: Callable[[Path, dict[str, Any]], None]
