"""`mempar profile --diff A B`: two profiles side by side, phase by phase, and the settings in which they differ."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mempar.tools.profile.phases import PhaseFigures, phase_figures
from mempar.tools.profile.report import Report, load_report
from mempar.tools.profile.summary import show_bytes

_WIDTH = 110
_COMMIT_DIGITS = 10
# Of a setting's value.
_SHOWN_LETTERS = 200


def compare(first: Path, second: Path, say: Callable[[str], None]) -> None:
    """Compare two profiles.

    Args:
        first: directory of a profile, or its report.json.
        second: another.
        say: prints a line.

    Raises:
        ConfigError: when one cannot be read.
    """
    before, after = load_report(first), load_report(second)
    say(f"A: {first}, {_about(before)}")
    say(f"B: {second}, {_about(after)}")
    differing = [*differences(before, after)]
    say("settings are the same" if not differing else "settings that differ: " + "; ".join(differing))
    say(comparison_table(before, after))


def _about(report: Report) -> str:
    run = report.run
    return f"{run.name} on {run.world_size} x {run.device}, {run.seconds_per_step * 1e3:,.1f} ms a step, {run.date}"


def differences(before: Report, after: Report) -> Iterator[str]:
    """Settings, ranks, versions and sources in which two profiles differ."""
    for name in ("name", "world_size", "device"):
        yield from _differing(name, getattr(before.run, name), getattr(after.run, name))
    yield from _differing("commit", before.run.commit[:_COMMIT_DIGITS], after.run.commit[:_COMMIT_DIGITS])
    yield from _differing("versions", before.run.versions, after.run.versions)
    yield from _differing("", before.run.config, after.run.config)


def _differing(name: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{name}.{key}" if name else key
            # The run's name is told beside its settings.
            if inner != "name" or name:
                yield from _differing(inner, before.get(key), after.get(key))
    elif before != after:
        yield f"{name} is {_shown(before)} in A and {_shown(after)} in B"


def _shown(value: Any) -> str:
    text = str(value) if value not in (None, "") else "nothing"
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 1]}…"


def comparison_table(before: Report, after: Report) -> str:
    """Render times and bytes of a step on a rank by phase, those that changed most microseconds first."""
    sides = [{(each.phase, each.group): each for each in phase_figures(report)} for report in (before, after)]
    table = Table(title="of a step on a rank, mean over ranks", title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    for header in ("A us", "B us", "B/A", "A bytes", "B bytes", "B/A"):
        table.add_column(header, justify="right", no_wrap=True)

    def change(key: tuple[str, str]) -> float:
        return -abs((sides[0][key].us if key in sides[0] else 0) - (sides[1][key].us if key in sides[1] else 0))

    step = [report.run.seconds_per_step * 1e6 for report in (before, after)]
    table.add_row("whole step", f"{step[0]:,.0f}", f"{step[1]:,.0f}", _ratio(*step), "", "", "", style="bold")
    for key in sorted(sides[0].keys() | sides[1].keys(), key=lambda key: (change(key), key)):
        # Names come from a file, and are no markup.
        table.add_row(*map(Text, _cells(key, sides[0].get(key), sides[1].get(key))))
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()


def _cells(key: tuple[str, str], before: PhaseFigures | None, after: PhaseFigures | None) -> list[str]:
    phase, group = key
    name = phase if not group or "/" in phase else f"{phase} ({group})"
    us = [side.us if side else 0.0 for side in (before, after)]
    sent = [side.sent_bytes if side else 0.0 for side in (before, after)]
    times = [f"{side.us:,.0f}" if side else "-" for side in (before, after)]
    bytes_shown = [show_bytes(side.sent_bytes) if side and group else "-" for side in (before, after)]
    return [name, *times, _ratio(*us), *bytes_shown, _ratio(*sent) if group else "-"]


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.2f}x" if before and after else "-"
