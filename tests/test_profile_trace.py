"""The trace: it fits its schema, slices nest, arrows are paired."""

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mempar.marks import Span
from mempar.tools.profile.trace import TRACE, save_trace, trace
from trace_check import check_times, problems

SCHEMA = json.loads(files("mempar.tools.profile").joinpath("trace.schema.json").read_text())
SPANS = {
    0: [
        Span(2, 1, 0, "query", "", 1_000, 3_000),
        Span(2, 1, 0, "values", "mp", 3_500, 4_000, 500, 64, 128),
        Span(2, 1, 0, "output_grads", "mp", 9_000, 9_500, 500, 64, 128),
        Span(2, 1, 0, "query_backward", "", 10_000, 12_500),
        Span(2, -1, -1, "row_update", "", 13_000, 14_000),
    ],
    # Two that overlap, as asynchronous calls do.
    1: [
        Span(2, -1, -1, "send/pp", "pp", 1_500, 5_000, 100, 8, 8),
        Span(2, -1, -1, "send/pp", "pp", 2_500, 6_000, 100, 8, 8),
        Span(2, -1, -1, "send/pp", "pp", 5_500, 7_000, 100, 8, 8),
    ],
}


def of_kind(found: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in found["traceEvents"] if event["ph"] == phase]


def test_trace_fits_its_schema_and_nests(tmp_path: Path) -> None:
    save_trace(SPANS, tmp_path)
    found = json.loads((tmp_path / TRACE).read_text())
    assert problems(found, SCHEMA) == []
    check_times(found)


def test_trace_has_a_track_a_kind_and_further_ones_where_calls_overlap() -> None:
    names = {
        (event["pid"], event["args"]["name"]) for event in of_kind(trace(SPANS), "M") if event["name"] == "thread_name"
    }
    assert names == {
        (0, "memory layers, forward"),
        (0, "memory layers, backward"),
        (0, "memory exchange (mp)"),
        (0, "update"),
        (1, "send/pp"),
        (1, "send/pp 2"),
    }


def test_trace_begins_at_the_first_span_of_all_ranks_and_tells_bytes() -> None:
    slices = of_kind(trace(SPANS), "X")
    assert min(event["ts"] for event in slices) == 0
    (values,) = [event for event in slices if event["name"] == "values"]
    assert (values["ts"], values["dur"], values["cat"]) == (2.5, 0.5, "collective")
    assert values["args"] == {"step": 2, "layer": 1, "micro_batch": 0, "group": "mp", "bytes": 64, "exposed_us": 0.5}


def test_arrows_lead_from_forward_phases_to_their_twins() -> None:
    found = trace(SPANS)
    starts, ends = of_kind(found, "s"), of_kind(found, "f")
    assert [event["ts"] for event in starts] == [0.0, 2.5]
    assert [event["ts"] for event in ends] == [9.0, 8.0]
    assert [event["id"] for event in starts] == [event["id"] for event in ends]


def test_trace_of_nothing_is_empty() -> None:
    assert trace({})["traceEvents"] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda events: events[1].update(ts=-1.0),
        lambda events: events[1].update(dur="long"),
        lambda events: events[1].pop("args"),
        lambda events: events[1]["args"].update(more=1),
        lambda events: events[1].update(cat="other"),
        lambda events: events[0].update(pid=True),
    ],
)
def test_schema_refuses_other_traces(spoil: Any) -> None:
    found = copy.deepcopy(trace(SPANS))
    spoil(found["traceEvents"])
    assert problems(found, SCHEMA)


def test_check_of_times_sees_what_crosses_and_what_is_unpaired() -> None:
    crossing = {0: [Span(1, 1, 0, "query", "", 10, 30), Span(1, 1, 0, "topk", "", 20, 40)]}
    found = trace(crossing)
    for event in of_kind(found, "X"):
        event["tid"] = 1
    with pytest.raises(AssertionError, match="crosses"):
        check_times(found)
    found = trace(SPANS)
    found["traceEvents"].remove(of_kind(found, "f")[0])
    with pytest.raises(AssertionError):
        check_times(found)
