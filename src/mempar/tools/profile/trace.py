"""trace.json: the spans of all ranks for Perfetto or chrome://tracing.

One process a rank, one track a kind of phase; where calls of one track overlap, which asynchronous ones do, further
tracks beside it. Arrows lead from a forward phase of a micro-batch to its twin in the backward pass. The file is
described by trace.schema.json.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mempar.marks import Span
from mempar.runtime.durable import replace_file

TRACE = "trace.json"
# What a phase of the forward pass becomes in the backward pass.
TWINS = {
    "query": "query_backward",
    "topk": "topk_backward",
    "gather": "gather_backward",
    "gate": "gate_backward",
    "values": "output_grads",
    "values_inside": "output_grads_inside",
    "values_across": "output_grads_across",
    "entries": "score_grads",
    "token_gather": "score_gather",
}
_UPDATE = ("reduce_rows", "row_update", "dense_update")
# What the simulator knows beside memory layers.
_DENSE = ("norms", "attention", "core_attn", "mlp", "experts", "head")


def save_trace(spans: dict[int, list[Span]], directory: Path) -> None:
    """Write trace.json."""
    replace_file(directory / TRACE, json.dumps(trace(spans), separators=(",", ":")).encode())


def trace(spans: dict[int, list[Span]]) -> dict[str, Any]:
    """Make the trace.

    Args:
        spans: of each rank.

    Returns:
        An object of Chrome's trace format, times in microseconds from the first span on.
    """
    origin = min((span.start_ns for of_rank in spans.values() for span in of_rank), default=0)
    events: list[dict[str, Any]] = []
    for rank in sorted(spans):
        number = _Numbers()
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        lanes = _lanes(spans[rank])
        for span in sorted(spans[rank], key=lambda span: (span.start_ns, -span.end_ns)):
            tid = number.of(lanes[id(span)])
            events.append(_slice(span, rank, tid, origin))
        for _, forward, backward in _twins(spans[rank]):
            number.arrows += 1
            for phase, span in (("s", forward), ("f", backward)):
                events.append(_arrow(phase, span, rank, number.of(lanes[id(span)]), number.arrows, origin))
        for lane, tid in number.lanes.items():
            events.append(_name("thread_name", rank, tid, lane))
    return {"displayTimeUnit": "ms", "traceEvents": events}


class _Numbers:
    """Numbers of one rank's tracks, in the order of their first calls, and of its arrows."""

    def __init__(self) -> None:
        self.lanes: dict[str, int] = {}
        self.arrows = 0

    def of(self, lane: str) -> int:
        return self.lanes.setdefault(lane, len(self.lanes) + 1)


def track_of(span: Span) -> str:
    """The kind of a phase."""
    if "/" in span.phase:
        return span.phase
    if span.group:
        return f"memory exchange ({span.group})"
    if span.phase in _UPDATE:
        return "update"
    layers = "dense layers" if span.phase.removesuffix("_backward") in _DENSE else "memory layers"
    return f"{layers}, {'backward' if span.phase.endswith('_backward') else 'forward'}"


def _lanes(spans: list[Span]) -> dict[int, str]:
    """The track of each span, by its `id`: the first of its kind that is free when it begins."""
    busy_until: dict[str, list[int]] = defaultdict(list)
    lanes = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        track = track_of(span)
        ends = busy_until[track]
        place = next((place for place, end in enumerate(ends) if end <= span.start_ns), len(ends))
        ends[place:] = [span.end_ns, *ends[place + 1 :]]
        lanes[id(span)] = f"{track} {place + 1}" if place else track
    return lanes


def _twins(spans: list[Span]) -> Iterator[tuple[str, Span, Span]]:
    """Pairs of a forward phase's last call for a micro-batch and its twin's first one."""
    forward: dict[tuple[str, int, int, int], Span] = {}
    backward: dict[tuple[str, int, int, int], Span] = {}
    for span in spans:
        key = (span.phase, span.step, span.layer, span.micro_batch)
        if span.phase in TWINS:
            forward[key] = span
        else:
            backward.setdefault(key, span)
    for (phase, step, layer, micro_batch), span in forward.items():
        twin = backward.get((TWINS[phase], step, layer, micro_batch))
        # A product of two tables goes its ways in another order.
        if twin is not None and span.layer >= 0 and span.end_ns <= twin.start_ns:
            yield phase, span, twin


def _slice(span: Span, rank: int, tid: int, origin: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.phase,
        "cat": "collective" if span.group else "computation",
        "pid": rank,
        "tid": tid,
        "ts": (span.start_ns - origin) / 1e3,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "args": {
            "step": span.step,
            "layer": span.layer,
            "micro_batch": span.micro_batch,
            "group": span.group,
            "bytes": span.num_bytes,
            "exposed_us": span.exposed_ns / 1e3,
        },
    }


def _arrow(phase: str, span: Span, rank: int, tid: int, number: int, origin: int) -> dict[str, Any]:
    # From the beginning of one slice to that of the other: there it lies inside of both.
    ts = (span.start_ns - origin) / 1e3
    event = {"ph": phase, "name": "backward", "cat": "twin", "pid": rank, "tid": tid, "ts": ts}
    return {**event, "id": rank * 1_000_000_000 + number, **({"bp": "e"} if phase == "f" else {})}


def _name(kind: str, rank: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": {"name": name}}
