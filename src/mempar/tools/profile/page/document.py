"""The page as one file: head, plots, and the rows as a table that sorts and filters."""

import dataclasses
from pathlib import Path

from mempar.marks import Span
from mempar.runtime.durable import replace_file
from mempar.tools.page.document import embedded_json, page_file, render_document
from mempar.tools.page.svg import need_matplotlib
from mempar.tools.profile.page.byte_plots import bandwidth_and_ceiling, ceiling_by_size, predicted_and_measured
from mempar.tools.profile.page.settings import head_figures, settings_tables
from mempar.tools.profile.page.table_plots import row_skew, shard_imbalance
from mempar.tools.profile.page.time_plots import exposed_and_overlapped, time_by_phase, time_by_rank
from mempar.tools.profile.page.timeline import timeline
from mempar.tools.profile.report import Report, Row, load_report, load_spans

PAGE = "report.html"
# Rows that a browser sorts and filters without a pause.
MOST_ROWS = 40_000
# Where the field's own name is not what a reader wants.
_HEADS = {
    "bytes_predicted": "bytes predicted",
    "bytes_measured": "bytes measured",
    "microseconds": "time, µs",
    "algorithm_gb_per_s": "algorithm, GB/s",
    "bus_gb_per_s": "bus, GB/s",
    "exposed_us": "exposed, µs",
    "overlapped_us": "not waited for, µs",
}


def write_page(directory: Path) -> Path:
    """Draw the page of a profile, from the report and the spans that lie in its directory.

    Returns:
        The page, beside them.

    Raises:
        ConfigError: when matplotlib is missing, or the report or the spans are not there, damaged or impossible.
    """
    need_matplotlib(PAGE, "then `python -m mempar.tools.profile.page DIR` draws the page of a profile that is there")
    report = load_report(directory)
    page = directory / PAGE
    replace_file(page, render_page(report, load_spans(directory / report.spans)).encode())
    return page


def render_page(report: Report, spans: dict[int, list[Span]]) -> str:
    """Put the page together.

    Raises:
        ConfigError: when matplotlib is missing.
    """
    plots = [
        time_by_phase(report),
        time_by_rank(report),
        exposed_and_overlapped(report),
        predicted_and_measured(report),
        bandwidth_and_ceiling(report),
        ceiling_by_size(report),
        shard_imbalance(report),
        row_skew(report),
        timeline(spans),
    ]
    return render_document(
        title=f"Profile of {report.run.name}",
        subtitle=f"{report.run.date}, {report.run.device}",
        head=f"{head_figures(report)}\n{settings_tables(report.run)}",
        plots=plots,
        sections=rows_section(report.rows),
        script=page_file("mempar.tools.profile.page", "rows.js"),
        style=page_file("mempar.tools.profile.page", "rows.css"),
    )


def rows_section(rows: list[Row]) -> str:
    """The table of rows: its data, and what the script fills."""
    fields = [each.name for each in dataclasses.fields(Row)]
    kept = rows[:MOST_ROWS]
    data = {"fields": fields, "rows": [[getattr(row, field) for field in fields] for row in kept]}
    left_out = f" The first {MOST_ROWS:,} of {len(rows):,}: report.json has all." if len(kept) < len(rows) else ""
    heads = "".join(
        f'<th scope="col" data-field="{field}"><button type="button">{_HEADS.get(field, field)}</button></th>'
        for field in fields
    )
    return f"""<section aria-label="rows">
<h2>Rows: one for each rank, step, layer and phase</h2>
<p>A click on a head sorts. Words filter: <code>values</code>, <code>rank=0</code>, <code>layer=3 phase=gate</code>.\
{left_out}</p>
<p><label>Filter <input id="filter" type="search" autocomplete="off" spellcheck="false"></label>
<output id="shown"></output></p>
<noscript><p>The table needs JavaScript; report.json has the same rows.</p></noscript>
<div class="scroll"><table id="rows"><thead><tr>{heads}</tr></thead><tbody></tbody><tfoot></tfoot></table></div>
<p><button type="button" id="more">Show more</button></p>
{embedded_json("rows-data", data)}
</section>"""
