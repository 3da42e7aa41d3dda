"""What doctor says: one finding a check, in three parts like every message, and how bad it is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK, NOTE, WARNING, ERROR = LEVELS = ("ok", "note", "warning", "error")
_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: subject and check, e.g. `versions.torch`.
        level: `ok`; `note`, worth knowing; `warning`, a run is slower or at risk; `error`, a run will fail.
        what: what is there, with the values.
        rule: what should be, and why; empty where all is well.
        remedy: what to do; empty where all is well.
        values: the numbers in `what`, for programs.
        nodes: names of those it is about; empty for all that were looked at.
    """

    check: str
    level: str
    what: str
    rule: str = ""
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Hold findings to their three parts."""
        assert self.level in LEVELS, self.level
        assert self.level == OK or (self.rule and self.remedy), f"{self.check} says no rule or no remedy"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def worst(findings: list[Finding]) -> str:
    """The worst level among some findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default=OK)


def size(num_bytes: float) -> str:
    """A size in words, in the unit that suits it."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, what: str) -> str:
    """A number of things: `1 rank`, `2 ranks`."""
    return f"{count} {what}" + ("s" if count != 1 else "")
