"""Figures of a phase over all ranks, layers and measured steps: what tables and comparisons show."""

from collections import defaultdict
from dataclasses import dataclass

from mempar.tools.profile.report import Report, Row


@dataclass(frozen=True, kw_only=True)
class PhaseFigures:
    """One phase.

    Attributes:
        phase: its name.
        group: whose collective it is; empty for computation.
        us: of a step on a rank, the mean over ranks and steps.
        sent_bytes: of a step on a rank, likewise.
        predicted_bytes: likewise; None where there is no formula.
        differing_rows: in how many of the report's rows the two differ.
        bus_gb_per_s: what crossed a rank's link by the time that it took.
        exposed_share: of its time, how much a rank waited; 0 for computation.
        slowest_rank: that spent most time on it.
        slowest_us: of a step on that rank.
    """

    phase: str
    group: str
    us: float
    sent_bytes: float
    predicted_bytes: float | None
    differing_rows: int
    bus_gb_per_s: float
    exposed_share: float
    slowest_rank: int
    slowest_us: float


def phase_figures(report: Report) -> list[PhaseFigures]:
    """Sum up a report by phases, those that take most time first."""
    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in report.rows:
        rows[row.phase, row.group].append(row)
    found = [_figures(phase, group, each, report) for (phase, group), each in rows.items()]
    return sorted(found, key=lambda figures: (-figures.us, figures.phase))


def _figures(phase: str, group: str, rows: list[Row], report: Report) -> PhaseFigures:
    steps = max(1, report.run.steps)
    shares = steps * max(1, report.run.world_size)
    by_rank: dict[int, float] = defaultdict(float)
    for row in rows:
        by_rank[row.rank] += row.microseconds
    total, exposed = sum(by_rank.values()), sum(row.exposed_us for row in rows)
    slowest = max(by_rank, key=lambda rank: by_rank[rank])
    predicted = [row.bytes_predicted for row in rows if row.bytes_predicted is not None]
    return PhaseFigures(
        phase=phase,
        group=group,
        us=total / shares,
        sent_bytes=sum(row.bytes_measured for row in rows) / shares,
        predicted_bytes=sum(predicted) / shares if predicted else None,
        differing_rows=sum(row.bytes_predicted not in (None, row.bytes_measured) for row in rows),
        bus_gb_per_s=sum(row.bus_gb_per_s * row.microseconds for row in rows) / total if total else 0.0,
        exposed_share=exposed / total if total else 0.0,
        slowest_rank=slowest,
        slowest_us=by_rank[slowest] / steps,
    )
