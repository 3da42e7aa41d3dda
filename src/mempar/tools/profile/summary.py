"""A profile in ten lines for the terminal: the phases that take most time, and advice."""

import io
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mempar.tools.profile.phases import PhaseFigures, phase_figures
from mempar.tools.profile.report import REPORT, Report

# Phases with a line of their own.
MAX_LINES = 10
# Narrower than this a terminal would break lines of the table.
_WIDTH = 110


def say_summary(report: Report, advice: Sequence[str], say: Callable[[str], None]) -> None:
    """Print the table, and what to do about it.

    Args:
        report: of a profile.
        advice: sentences.
        say: prints a line.
    """
    say(summary_table(report))
    differing = [figures for figures in phase_figures(report) if figures.differing_rows]
    if differing:
        rows = ", ".join(f"{figures.phase} ({figures.differing_rows})" for figures in differing)
        say(f"- bytes sent are NOT those predicted in some rows of {REPORT}, so many by phase: {rows}.")
    for sentence in advice:
        say(f"- {sentence}")


def summary_table(report: Report) -> str:
    """Render a report: phases by time, their bytes and bandwidth, how long ranks waited, the slowest rank."""
    run, phases = report.run, phase_figures(report)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    for header in ("us a step", "of step", "bytes a step", "predicted", "GB/s", "exposed", "slowest rank"):
        table.add_column(header, justify="right", no_wrap=True)
    step_us = run.seconds_per_step * 1e6
    for figures in phases[:MAX_LINES]:
        table.add_row(*map(Text, _cells(figures, step_us)))
    rest = phases[MAX_LINES:]
    if rest:
        us, sent = sum(figures.us for figures in rest), sum(figures.sent_bytes for figures in rest)
        table.add_row(f"{len(rest)} others", f"{us:,.0f}", f"{us / step_us:.1%}", show_bytes(sent), "", "", "", "")
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return f"{_head(report)}\n{text.getvalue().rstrip()}"


def _head(report: Report) -> str:
    run = report.run
    sizes = " ".join(f"{name}={size}" for name, size in run.layout.items() if size > 1)
    exposed = sum(row.exposed_us for row in report.rows) / run.steps / run.world_size / 1e6 / run.seconds_per_step
    return (
        f"{run.name} on {run.world_size} x {run.device}{', ' if sizes else ''}{sizes}: a step takes "
        f"{run.seconds_per_step * 1e3:,.1f} ms, {run.tokens_per_step / run.seconds_per_step:,.0f} tokens/s; ranks wait "
        f"for collectives {exposed:.0%} of it; marks cost {run.mark_cost_share:.2%}"
    )


def _cells(figures: PhaseFigures, step_us: float) -> list[str]:
    collective = bool(figures.group)
    predicted = "-"
    if figures.predicted_bytes is not None:
        said = show_bytes(figures.predicted_bytes)
        predicted = f"NOT {said}" if figures.differing_rows else "the same"
    name = figures.phase if not collective or "/" in figures.phase else f"{figures.phase} ({figures.group})"
    return [
        name,
        f"{figures.us:,.0f}",
        f"{figures.us / step_us:.1%}",
        show_bytes(figures.sent_bytes) if collective else "-",
        predicted if collective else "-",
        _rate(figures.bus_gb_per_s) if collective else "-",
        f"{figures.exposed_share:.0%}" if collective else "-",
        f"{figures.slowest_rank}: {figures.slowest_us:,.0f}",
    ]


def _rate(gb_per_s: float) -> str:
    return f"{gb_per_s:.3g}" if gb_per_s >= 0.001 else "<0.001"


def show_bytes(num_bytes: float) -> str:
    """A number of bytes in a unit in which it has few digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
