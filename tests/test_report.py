"""report.json and spans.json: what is written is read back, and nothing else is."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.marks import Span
from mempar.tools.profile.report import (
    REPORT,
    SPANS,
    CeilingPoint,
    ProfiledRun,
    Report,
    Row,
    TableReads,
    load_report,
    load_spans,
    save_report,
    save_spans,
)


def a_report() -> Report:
    run = ProfiledRun(
        name="toy",
        config={"train": {"steps": 3}, "more_memories": []},
        world_size=2,
        layout={"tp": 1, "mp": 2, "mp_rows": 1},
        group_sizes={"mp": 2},
        tokens_per_step=3072,
        steps=3,
        seconds_per_step=0.25,
        marks_per_step=40,
        mark_us=0.9,
        mark_cost_share=0.000144,
        versions={"mempar": "0"},
        commit="",
        date="2026-11-22T09:00:00+0000",
        device="cpu",
    )
    row = Row(
        rank=1,
        step=2,
        layer=3,
        phase="values",
        group="mp",
        calls=2,
        bytes_predicted=4096,
        bytes_measured=4096,
        microseconds=12.5,
        algorithm_gb_per_s=1.5,
        bus_gb_per_s=0.75,
        exposed_us=12.5,
        overlapped_us=0.0,
    )
    unpredicted = dataclasses.replace(row, phase="all_reduce/tp", group="tp", layer=-1, bytes_predicted=None)
    reads = TableReads(
        table="memory.values", rank=0, num_rows=8, rows_read=9, unique_rows=2, top_share=0.9, histogram=[[1, 1], [8, 1]]
    )
    point = CeilingPoint(
        group="mp",
        collective="all_to_all",
        ranks=2,
        message_bytes=1 << 20,
        microseconds=524.3,
        gb_per_s=2.0,
        latency_us=30.0,
    )
    return Report(run=run, rows=[row, unpredicted], tables=[reads], ceiling=[point])


SPANS_OF_TWO = {
    0: [Span(1, 3, 0, "query", "", 10, 20), Span(1, 3, 0, "values", "mp", 20, 35, 15, 64, 128)],
    1: [Span(1, -1, -1, "all_reduce/dp", "dp", 5, 9, 4, 256, 256)],
}


def test_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    save_report(a_report(), tmp_path)
    assert load_report(tmp_path) == load_report(tmp_path / REPORT) == a_report()


def test_spans_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    save_spans(SPANS_OF_TWO, tmp_path)
    assert load_spans(tmp_path / SPANS) == SPANS_OF_TWO


def nested(depth: int) -> Any:
    """Lists in lists."""
    return [nested(depth - 1)] if depth else 1


def set_row(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["rows"][0].__setitem__(name, value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("rows"),
        lambda data: data.update(surplus=1),
        lambda data: data.update(format=2),
        lambda data: data.update(spans="../elsewhere.json"),
        lambda data: data.update(rows={}),
        lambda data: data["run"].pop("name"),
        lambda data: data["run"].update(layout={"tp": "two"}),
        lambda data: data["tables"][0].update(histogram=[[1, 0.5]]),
        set_row("rank", True),
        set_row("calls", 1.5),
        set_row("phase", None),
        set_row("microseconds", "fast"),
        set_row("microseconds", 10**400),
        set_row("rank", 10**400),
        set_row("bytes_measured", 2**63),
        set_row("phase", "\ud800"),
        set_row("group", "a\x1b[2Jb"),
        lambda data: data["run"].update(world_size=10**12),
        lambda data: data["run"].update(world_size=0),
        lambda data: data["run"].update(layout={"pp": 0}),
        lambda data: data["run"].update(layout={"\ud800": 1}),
        lambda data: data["run"].update(name="\n"),
        lambda data: data["run"].update(config={"train": {"steps": 10**400}}),
        lambda data: data["run"].update(config={"train": ["\ud800"]}),
        lambda data: data["run"].update(config={"\x07": 1}),
        lambda data: data["run"].update(config={"deep": nested(40)}),
        lambda data: data["run"].update(config={"deep": nested(300)}),
        set_row("microseconds", -1.0),
        set_row("rank", 2),
    ],
)
def test_report_that_does_not_fit_gives_one_message(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    save_report(a_report(), tmp_path)
    data = json.loads((tmp_path / REPORT).read_text())
    spoil(data)
    (tmp_path / REPORT).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"is damaged or something else: .*make it anew") as refused:
        load_report(tmp_path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 800


def test_anything_that_may_be_a_setting_is_read(tmp_path: Path) -> None:
    report = a_report()
    config = {"é [/x] <b>": [None, True, 0.5, -(2**62), {"lists": nested(28)}], "": ""}
    report = dataclasses.replace(report, run=dataclasses.replace(report.run, config=config))
    save_report(report, tmp_path)
    assert load_report(tmp_path) == report


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b'{"format": NaN}', b"[" * 100_000, b"9" * 5000])
@pytest.mark.parametrize("load", [load_report, load_spans])
def test_file_that_is_something_else_gives_one_message(
    load: Callable[[Path], Any], content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged or something else"):
        load(path)


@pytest.mark.parametrize("load", [load_report, load_spans])
def test_file_that_cannot_be_read_gives_one_message(load: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nothing", tmp_path / "binary", tmp_path / "nul\0", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path)


@pytest.mark.parametrize(
    "row",
    [
        [],
        [1, 3, 0, "query", "", 20, 10, 0, 0, 0],
        [1, 3, 0, "query", "", 10, 20, 0, -1, 0],
        [1, 3, 0, 7, "", 10, 20, 0, 0, 0],
        [1, 3, 0, "query", "", 10.5, 20, 0, 0, 0],
        [1, 3, 0, "query", "", 10, 10**400, 0, 0, 0],
        [1, 3, 0, "\ud800", "", 10, 20, 0, 0, 0],
        "query",
    ],
)
def test_spans_that_do_not_fit_give_one_message(row: Any, tmp_path: Path) -> None:
    save_spans(SPANS_OF_TWO, tmp_path)
    data = json.loads((tmp_path / SPANS).read_text())
    data["ranks"][0]["spans"].append(row)
    (tmp_path / SPANS).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is damaged or something else"):
        load_spans(tmp_path / SPANS)


def test_report_cut_or_flipped_anywhere_is_refused_or_read(tmp_path: Path, rng: random.Random) -> None:
    save_report(a_report(), tmp_path)
    whole = (tmp_path / REPORT).read_bytes()
    for _ in range(200):
        spoiled = bytearray(whole[: rng.randrange(len(whole) - 1)] if rng.random() < 0.5 else whole)
        if len(spoiled) == len(whole):
            spoiled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / REPORT).write_bytes(spoiled)
        try:
            load_report(tmp_path)
        except ConfigError:
            continue
        # What is read in spite of it has one value of another, and nothing missing.
        assert len(spoiled) == len(whole)
