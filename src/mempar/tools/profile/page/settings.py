"""The head of the page: what ran, where, and how long a step took."""

from mempar.tools.page.plot import milliseconds, share
from mempar.tools.page.tables import pairs_table, settings_folded, tiles
from mempar.tools.profile.report import ProfiledRun, Report


def head_figures(report: Report) -> str:
    """The few figures that are asked for first."""
    run = report.run
    exposed = sum(row.exposed_us for row in report.rows if row.group) / (run.world_size * max(1, run.steps))
    step_us, cost = run.seconds_per_step * 1e6, run.mark_cost_share
    figures = [
        (milliseconds(step_us), "a step, the slowest rank's median"),
        (f"{run.tokens_per_step / run.seconds_per_step:,.0f}" if run.seconds_per_step else "–", "tokens a second"),  # noqa: RUF001
        (f"{run.world_size:,}", "rank" if run.world_size == 1 else "ranks"),
        (share(min(1.0, exposed / step_us)) if step_us else "–", "of a step waits for communication"),  # noqa: RUF001
        (f"{cost:.2%}" if cost >= 1e-4 else "< 0.01%", "of a step is the cost of the marks"),
    ]
    return tiles(figures)


def settings_tables(run: ProfiledRun) -> str:
    """What ran and where, and every setting of the run, folded."""
    facts = [
        ("run", run.name),
        ("date", run.date),
        ("device", run.device),
        ("layout", _pairs(run.layout)),
        ("ranks of each group", _pairs(run.group_sizes)),
        ("steps measured", f"{run.steps:,}"),
        ("tokens a step", f"{run.tokens_per_step:,}"),
        ("marks a step", f"{run.marks_per_step:,} of {run.mark_us:.3g} µs each"),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("commit", run.commit or "none"),
    ]
    return f"{pairs_table(facts, 'The run')}{settings_folded(run.config)}"


def _pairs(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name}={number}" for name, number in numbers.items()) or "none"
