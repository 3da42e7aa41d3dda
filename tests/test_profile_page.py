"""mempar.tools.profile.page: a page that stands alone, says what is seen, and lets nothing of a file become markup."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from mempar.errors import ConfigError
from mempar.marks import Span
from mempar.recipes import find_recipe
from mempar.tools.profile import command
from mempar.tools.profile.page import PAGE, write_page
from mempar.tools.profile.page.__main__ import main
from mempar.tools.profile.page.byte_plots import (
    bytes_label,
    ceiling_at,
    collective_of,
    plain_label,
    predicted_and_measured,
)
from mempar.tools.profile.page.document import render_page, rows_section
from mempar.tools.profile.page.phases import ENGINE, FAMILIES, OTHER, VALUES, family_of, in_order
from mempar.tools.profile.page.settings import settings_tables
from mempar.tools.profile.page.table_plots import row_skew, shard_imbalance
from mempar.tools.profile.page.time_plots import layer_colours, time_by_phase, time_by_rank
from mempar.tools.profile.page.timeline import bars_of, middle_step, timeline
from mempar.tools.profile.report import SPANS, CeilingPoint, Report, load_report, load_spans, save_report, save_spans
from page_reader import HOSTILE, Page, read_page
from profile_reports import LAYERS, made_up_profile

PLOTS = [
    "time-by-phase",
    "time-by-rank",
    "exposed-and-overlapped",
    "predicted-and-measured",
    "bandwidth-and-ceiling",
    "ceiling-by-size",
    "shard-imbalance",
    "row-skew",
    "timeline",
]


def read(text: str) -> Page:
    """Read a profile's page: with all plots, and one script beside its data."""
    page = read_page(text)
    assert list(page.titles) == PLOTS
    assert [tag for tag, _ in page.elements].count("script") == 2
    return page


def rows_of(page: Page) -> dict[str, Any]:
    """The data of the table."""
    return json.loads(page.texts["script"][0])


@pytest.fixture(scope="module")
def many() -> tuple[Report, dict[int, list[Span]], str]:
    """Sixteen ranks and their page."""
    report, spans = made_up_profile(16)
    return report, spans, render_page(report, spans)


@pytest.fixture(scope="module")
def one() -> tuple[Report, dict[int, list[Span]], str]:
    """One rank and its page."""
    report, spans = made_up_profile(1)
    return report, spans, render_page(report, spans)


def test_page_of_many_ranks_draws_everything(many: tuple[Report, dict[int, list[Span]], str]) -> None:
    report, _, text = many
    page = read(text)
    assert page.drawn == set(PLOTS)
    data = rows_of(page)
    assert [dict(zip(data["fields"], row, strict=True)) for row in data["rows"]] == [
        dataclasses.asdict(row) for row in report.rows
    ]
    assert "Rank 14 is the slowest" in page.titles["time-by-rank"]
    # Nobody measured what a rank did meanwhile.
    assert "not waited for, µs" in page.texts["button"] and "the rank computes" not in text
    assert "to the byte, in all 768 rows" in page.titles["predicted-and-measured"]
    assert re.search(r"Rank 0 serves most: 1\.\d\d times .* table0", page.titles["shard-imbalance"])
    assert "1% of the rows of table0 get 2" in page.titles["row-skew"]
    assert len(text) < 2_000_000


def test_page_of_one_rank_says_what_there_is_not(one: tuple[Report, dict[int, list[Span]], str]) -> None:
    page = read(one[2])
    assert page.drawn == {"time-by-phase", "time-by-rank", "row-skew", "timeline"}
    assert "nobody waits" in page.titles["time-by-rank"]
    assert page.titles["exposed-and-overlapped"].startswith("No rank communicated")
    assert page.titles["shard-imbalance"].startswith("Each table lies whole on one rank")


def test_page_without_memory_or_without_anything() -> None:
    report, spans = made_up_profile(4, memory=False)
    dense = read(render_page(report, spans))
    assert dense.drawn == set(PLOTS) - {"predicted-and-measured", "shard-imbalance", "row-skew"}
    assert "no memory table" in dense.titles["row-skew"]
    empty = read(render_page(dataclasses.replace(report, rows=[], tables=[], ceiling=[]), {0: []}))
    assert not empty.drawn and rows_of(empty)["rows"] == []
    run = dataclasses.replace(report.run, seconds_per_step=0.0, steps=0, world_size=1, config={})
    unread = dataclasses.replace(made_up_profile(1)[0].tables[0], rows_read=0, unique_rows=0, histogram=[])
    nothing = read(render_page(Report(run=run, rows=[], tables=[unread]), {}))
    assert nothing.titles["shard-imbalance"] == nothing.titles["row-skew"] == "No row of a table was read."


def test_nothing_of_a_file_becomes_markup() -> None:
    report, spans = made_up_profile(3, layers=(4,), name=HOSTILE, table=HOSTILE)
    rows = [dataclasses.replace(row, phase=HOSTILE if row.layer < 0 else row.phase) for row in report.rows]
    run = dataclasses.replace(
        report.run,
        config={HOSTILE: {HOSTILE: [HOSTILE, None, True]}},
        layout={HOSTILE: 1},
        versions={HOSTILE: HOSTILE},
        device=HOSTILE,
        date=HOSTILE,
        commit=HOSTILE,
    )
    ceiling = [dataclasses.replace(point, group=HOSTILE, collective=HOSTILE) for point in report.ceiling]
    hostile = {rank: [dataclasses.replace(span, phase=HOSTILE) for span in of] for rank, of in spans.items()}
    text = render_page(dataclasses.replace(report, run=run, rows=rows, ceiling=ceiling), hostile)
    page = read(text)
    assert "<script>alert" not in text
    assert page.texts["title"] == [f"Profile of {HOSTILE}"] and page.texts["h1"] == [f"Profile of {HOSTILE}"]
    assert HOSTILE in {row[3] for row in rows_of(page)["rows"]}
    assert f"{HOSTILE}.{HOSTILE}" in page.texts["th"]


def test_axes_have_quantities_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    labels: dict[Any, tuple[str, str, bool]] = {}
    print_svg = FigureCanvasSVG.print_svg

    def spy(canvas: Any, *args: Any, **kwargs: Any) -> None:
        (axes,) = canvas.figure.axes
        named = any(re.search("[a-z]", label.get_text()) for label in axes.get_yticklabels())
        labels[canvas.figure] = axes.get_xlabel(), axes.get_ylabel(), named
        print_svg(canvas, *args, **kwargs)

    monkeypatch.setattr(FigureCanvasSVG, "print_svg", spy)
    report, spans = made_up_profile(2, layers=(4,))
    before = dict(matplotlib.rcParams)
    render_page(report, spans)
    assert dict(matplotlib.rcParams) == before
    assert len(labels) == len(PLOTS)
    # Names stand for themselves; a number has its quantity.
    assert all(x and (y or named) for x, y, named in labels.values()), labels


def test_more_ranks_than_fit_are_left_to_the_trace() -> None:
    report, spans = made_up_profile(40, layers=(4,))
    assert "The 32 of 40 ranks that wait least" in time_by_rank(report).note
    assert "The first 16 of 40 ranks" in timeline(spans).note


def test_rows_beyond_the_browsers_patience_are_left_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mempar.tools.profile.page.document.MOST_ROWS", 10)
    report, _ = made_up_profile(1, layers=(4,))
    text = rows_section(report.rows)
    assert f"The first 10 of {len(report.rows)}: report.json has all." in text
    assert len(json.loads(Page(text).texts["script"][0])["rows"]) == 10


def test_write_page_beside_the_report(tmp_path: Path, one: tuple[Report, dict[int, list[Span]], str]) -> None:
    report, spans, text = one
    save_report(report, tmp_path)
    save_spans(spans, tmp_path)
    code = (
        "import sys; from mempar.tools.profile.page.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'matplotlib.pyplot' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(tmp_path / PAGE))
    assert (tmp_path / PAGE).read_text() == text


def test_page_says_how_to_get_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed .* `pip install 'mempar\[report\]'"):
        write_page(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_profile_without_matplotlib_is_written_but_for_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, spans = made_up_profile(2, layers=(4,))
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = command._write(tmp_path, find_recipe("smoke"), report, spans, said.append)
    assert written.startswith("report.json")
    assert len(said) == 1 and said[0].startswith("report.html is not written")
    assert load_report(tmp_path) == report and load_spans(tmp_path / SPANS) == spans
    assert (tmp_path / "trace.json").is_file() and not (tmp_path / PAGE).exists()


def test_page_of_nothing_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_page_of_impossible_figures_is_one_message(tmp_path: Path) -> None:
    report, spans = made_up_profile(2, layers=(4,))
    row, shard = report.rows[0], report.tables[0]
    save_spans(spans, tmp_path)
    for wrong, message in [
        ({"run": dataclasses.replace(report.run, world_size=0)}, "0 ranks"),
        ({"rows": [row, dataclasses.replace(row, rank=2)]}, r"rows\[1\] is of rank 2 of 2"),
        ({"rows": [dataclasses.replace(row, microseconds=-1.0)]}, r"rows\[0\] .* less than nothing"),
        ({"tables": [dataclasses.replace(shard, rank=-1)]}, r"tables\[0\] is of rank -1"),
        ({"tables": [dataclasses.replace(shard, histogram=[[1]])]}, "histogram"),
        ({"tables": [dataclasses.replace(shard, histogram=[[1 << 70, 1]])]}, "histogram"),
    ]:
        save_report(dataclasses.replace(report, **wrong), tmp_path)
        with pytest.raises(ConfigError, match=message):
            write_page(tmp_path)
    assert not (tmp_path / PAGE).exists()


def test_ceiling_lies_between_measured_sizes() -> None:
    def point(size: int, speed: float, group: str = "mp") -> CeilingPoint:
        return CeilingPoint(
            group=group,
            collective="all_to_all",
            ranks=2,
            message_bytes=size,
            microseconds=1.0,
            gb_per_s=speed,
            latency_us=1.0,
        )

    points = [point(10_000, 4.0), point(100, 1.0), point(100, 50.0, "tp")]
    assert ceiling_at(points, "mp", "all_to_all", 1000) == pytest.approx(2.0)
    # Latency is all below, bandwidth beyond.
    assert ceiling_at(points, "mp", "all_to_all", 50) == pytest.approx(0.5)
    assert ceiling_at(points, "mp", "all_to_all", 10**9) == 4.0
    assert ceiling_at(points, "mp", "all_reduce", 1000) is None
    assert ceiling_at(points, "dp", "all_to_all", 1000) is None
    kinds = ("values", "send/pp", "receive/pp", "all_reduce/tp", "reduce_scatter/dp", "all_to_all/ep")
    assert [collective_of(phase) for phase in kinds] == [
        "all_to_all",
        "send",
        "send",
        "all_reduce",
        "all_reduce",
        "all_to_all",
    ]


def test_times_of_phases_are_means_over_ranks_and_steps() -> None:
    report, _ = made_up_profile(2, layers=(4,))
    rows = [dataclasses.replace(row, microseconds=1.0) for row in report.rows if row.phase != "query"]
    # Twice a step on one of two ranks.
    rows += [dataclasses.replace(report.rows[0], step=step, microseconds=9000.0) for step in (1, 2, 3)]
    assert time_by_phase(dataclasses.replace(report, rows=rows)).title.startswith("query takes longest: 4.5 ms a step")


def test_even_reads_are_called_even() -> None:
    report, _ = made_up_profile(4, layers=(4,))
    even = dataclasses.replace(
        report, tables=[dataclasses.replace(shard, rows_read=1000) for shard in report.tables], ceiling=[]
    )
    assert shard_imbalance(even).title == "Shards serve equally many reads, to within 2%"
    assert row_skew(even).svg


def test_shards_are_compared_within_their_stage() -> None:
    report, _ = made_up_profile(4, layers=(4,))
    run = dataclasses.replace(report.run, layout={**report.run.layout, "pp": 2})
    # The first stage has three layers of the table, the second one has one.
    reads = [3000, 3000, 1000, 1000]
    tables = [dataclasses.replace(shard, rows_read=reads[shard.rank]) for shard in report.tables]
    assert shard_imbalance(dataclasses.replace(report, run=run, tables=tables)).title.endswith("to within 2%")
    tables[3] = dataclasses.replace(tables[3], rows_read=3000)
    uneven = shard_imbalance(dataclasses.replace(report, run=run, tables=tables))
    assert uneven.title.startswith("Rank 3 serves most: 1.50 times")
    alone = dataclasses.replace(run, layout={**run.layout, "pp": 4})
    assert shard_imbalance(dataclasses.replace(report, run=alone, tables=tables)).title.startswith("Each table lies")


def test_step_of_the_timeline_is_the_middle_one() -> None:
    def span(step: int, start: int, end: int) -> Span:
        return Span(step, 0, 0, "values", "mp", start, end)

    spans = {0: [span(1, 0, 5), span(2, 10, 12), span(3, 20, 28)], 1: [span(2, 11, 19)]}
    # They take 5, 9 and 8.
    assert middle_step(spans) == 3
    assert middle_step({0: []}) is None


def test_bars_that_cannot_be_told_apart_are_one() -> None:
    spans = [Span(1, 0, 0, "values", "mp", start, start + 10_000) for start in range(0, 10_000_000, 10_001)]
    assert bars_of(spans, 0, 10_000_000) == [(0.0, pytest.approx(10.0, abs=0.02))]
    apart = [Span(1, 0, 0, "values", "mp", start, start) for start in (9_000_000, 0)]
    # What takes no time is drawn as wide as can be seen.
    assert bars_of(apart, 0, 9_000_000) == [(0.0, 0.0025), (9.0, pytest.approx(0.0025))]


def test_many_layers_are_told_apart_and_wrong_predictions_shown() -> None:
    report, _ = made_up_profile(2, layers=tuple(range(20)))
    svg = time_by_phase(report).svg
    assert all(colour in svg for colour in layer_colours(list(range(20))).values())
    rows = [
        dataclasses.replace(row, bytes_predicted=0 if row.phase == "values" else row.bytes_predicted)
        for row in report.rows
    ]
    missing = dataclasses.replace(report.rows[0], group="mp", calls=0, bytes_predicted=7, bytes_measured=0)
    unseen = predicted_and_measured(dataclasses.replace(report, rows=[*report.rows, missing]))
    assert unseen.svg and unseen.title.startswith("Measured bytes differ from the predicted ones in 1 of ")
    alone = predicted_and_measured(dataclasses.replace(report, rows=[missing]))
    assert alone.svg and alone.title.startswith("Measured bytes differ from the predicted ones in 1 of 1 rows")
    wrong = predicted_and_measured(dataclasses.replace(report, rows=rows))
    assert wrong.svg and wrong.title.startswith("Measured bytes differ from the predicted ones in 120 of ")


def test_phases_have_one_family_and_an_order() -> None:
    named = [phase for family in FAMILIES for phase in family.phases]
    assert len(named) == len(set(named))
    assert in_order(set(named))[:3] == ["query", "topk", "route"] and in_order(set(named))[-1] == "row_update"
    assert in_order({"unknown", "all_reduce/tp", "values", "query"}) == ["query", "values", "all_reduce/tp", "unknown"]
    assert (family_of("values_across"), family_of("all_reduce/tp"), family_of("unknown")) == (VALUES, ENGINE, OTHER)
    assert len({family.colour for family in FAMILIES}) == len(FAMILIES)
    colours = layer_colours([*LAYERS, -1])
    assert len(set(colours.values())) == 4 and colours[-1] == "#a3a3a3".upper()


def test_labels_of_axes_have_units() -> None:
    assert [bytes_label(value) for value in (1.0, 1e3, 1e7, 1e12)] == ["1 B", "1 kB", "10 MB", "1 TB"]
    assert [plain_label(value) for value in (0.001, 0.1, 1.0, 100.0, 1e-9)] == ["0.001", "0.1", "1", "100", "1e-09"]


def test_settings_are_named_as_on_the_command_line() -> None:
    report, _ = made_up_profile(1, layers=(4,))
    text = settings_tables(report.run)
    assert '<th scope="row">memory.layers</th><td>[4, 12, 20]</td>' in text
    assert '<th scope="row">data.weights</th><td>null</td>' in text
    assert '<th scope="row">data.shuffle</th><td>true</td>' in text
    assert "All 10 settings" in text
