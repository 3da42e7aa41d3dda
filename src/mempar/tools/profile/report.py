"""report.json and spans.json, what `mempar profile` writes: dataclasses, and how they are read back.

Whoever reads them, a page, a table or a comparison, may be given any file: what does not fit ends in one message.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from mempar.errors import ConfigError
from mempar.marks import Span
from mempar.runtime.durable import replace_file
from mempar.tools.profile.plain_json import checked, fits, parse, read_dataclass

FORMAT = 1
REPORT, SPANS = "report.json", "spans.json"
# More than any run has: whoever shows a report goes through its ranks.
MOST_RANKS = 2**20
# Of what is wrong with a file, in a message.
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class ProfiledRun:
    """What was measured, and where.

    Attributes:
        name: of the run.
        config: every setting, by section.
        world_size: ranks.
        layout: tp, pp, vpp, cp, ep, dp, mp, mp_rows, mp_hops; sequence_parallel and distributed_optimizer as 0 or 1.
        group_sizes: ranks of each group that `rows` name.
        tokens_per_step: of the global batch.
        steps: that were measured, after the warm-up.
        seconds_per_step: median over the steps of the slowest rank's time.
        marks_per_step: spans of the rank that has most.
        mark_us: measured cost of one.
        mark_cost_share: of a step that marks took: their number times their cost.
        versions: of mempar, torch, megatron-core and Python.
        commit: of the source; empty where there is no repository.
        date: with time and zone.
        device: what computed.
    """

    name: str
    config: dict[str, Any]
    world_size: int
    layout: dict[str, int]
    group_sizes: dict[str, int]
    tokens_per_step: int
    steps: int
    seconds_per_step: float
    marks_per_step: int
    mark_us: float
    mark_cost_share: float
    versions: dict[str, str]
    commit: str
    date: str
    device: str

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of a world rank: stages are outermost in the order of ranks."""
        return rank * self.layout.get("pp", 1) // self.world_size


@dataclass(frozen=True, kw_only=True)
class CeilingPoint:
    """What a group's links gave to messages of one size in the same run, as `runtime/profile/ceiling.py` measures it.

    Attributes:
        group: as in rows.
        collective: `all_to_all`, `all_reduce` or `send`.
        ranks: of the group.
        message_bytes: of one call, counted as `bytes_measured` is.
        microseconds: of one call.
        gb_per_s: bus bandwidth, 1e9 bytes a second.
        latency_us: of the smallest message.
    """

    group: str
    collective: str
    ranks: int
    message_bytes: int
    microseconds: float
    gb_per_s: float
    latency_us: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One phase of one layer in one step on one rank, all its calls together.

    Attributes:
        rank: world rank.
        step: from 1.
        layer: 0-based block; -1 outside memory layers.
        phase: see `mempar.marks.Span`.
        group: whose collective it is; empty for computation.
        calls: how often.
        bytes_predicted: after parallel/cost.py in the run's actual counts; None for megatron's and for computation.
        bytes_measured: summed from the tensors handed to collectives.
        microseconds: from begin to end, summed.
        algorithm_gb_per_s: size of the messages by that time, 1e9 bytes a second.
        bus_gb_per_s: what crossed a rank's link by that time.
        exposed_us: of a collective, how long this rank waited for it.
        overlapped_us: the rest of a collective's time, not waited for: whether the rank computed then is not known.
    """

    rank: int
    step: int
    layer: int
    phase: str
    group: str
    calls: int
    bytes_predicted: int | None
    bytes_measured: int
    microseconds: float
    algorithm_gb_per_s: float
    bus_gb_per_s: float
    exposed_us: float
    overlapped_us: float


@dataclass(frozen=True, kw_only=True)
class TableReads:
    """What was read of one shard, over all measured steps.

    Attributes:
        table: name of the whole table.
        rank: whose shard it is.
        num_rows: of the shard.
        rows_read: entries that were served.
        unique_rows: distinct rows among them.
        top_share: share of the reads that went to the 1% of the shard's rows that were read most.
        histogram: pairs of a power of two b and the number of rows read at least b and fewer than 2b times; rows that
            were not read are left out.
    """

    table: str
    rank: int
    num_rows: int
    rows_read: int
    unique_rows: int
    top_share: float
    histogram: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of report.json."""

    run: ProfiledRun
    rows: list[Row]
    tables: list[TableReads]
    ceiling: list[CeilingPoint] = field(default_factory=list)
    spans: str = SPANS
    format: int = FORMAT


def save_report(report: Report, directory: Path) -> None:
    """Write report.json."""
    text = json.dumps(dataclasses.asdict(report), allow_nan=False, separators=(",", ":"))
    replace_file(directory / REPORT, (text + "\n").encode())


def load_report(path: Path) -> Report:
    """Read a report.

    Args:
        path: report.json, or the directory in which it lies.

    Raises:
        ConfigError: when it is not there, damaged, something else, or says what cannot have been measured.
    """
    try:
        path = path / REPORT if path.is_dir() else path
    except OSError as error:
        raise _unreadable(path, error) from None
    data = _load(path)
    try:
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}; this version reads {FORMAT}")
        report = read_dataclass(Report, data, "report")
        if Path(report.spans).name != report.spans:
            raise ValueError(f"spans={report.spans!r} is not the name of a file beside it")
        if wrong := impossible(report):
            raise ValueError(wrong)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return report


def impossible(report: Report) -> str:
    """What cannot have been measured: sizes and times below zero, ranks that are not there; empty if all may be."""
    run = report.run
    if not 1 <= run.world_size <= MOST_RANKS or run.tokens_per_step < 1 or run.steps < 0 or run.seconds_per_step < 0:
        return f"{run.world_size} ranks, {run.tokens_per_step} tokens, {run.steps} steps of {run.seconds_per_step} s"
    if run.layout.get("pp", 1) < 1 or min(run.layout.values(), default=0) < 0:
        return f"sizes of the layout are {[*run.layout.values()]}"
    for place, row in enumerate(report.rows):
        figures = (row.calls, row.bytes_predicted or 0, row.bytes_measured, row.microseconds, row.bus_gb_per_s)
        if not 0 <= row.rank < run.world_size or min(*figures, row.exposed_us, row.overlapped_us) < 0:
            return f"rows[{place}] is of rank {row.rank} of {run.world_size}, or counts less than nothing"
    for place, shard in enumerate(report.tables):
        pairs = shard.histogram
        if not 0 <= shard.rank < run.world_size or min(shard.num_rows, shard.rows_read, shard.unique_rows) < 0:
            return f"tables[{place}] is of rank {shard.rank} of {run.world_size}, or counts less than nothing"
        if not all(len(pair) == 2 and 0 < pair[0] < 1 << 62 and pair[1] >= 0 for pair in pairs):
            return f"tables[{place}].histogram is not one of reads and rows"
    return ""


def save_spans(spans: dict[int, list[Span]], directory: Path) -> None:
    """Write spans.json: for each rank rows of the fields of `Span`, in the order in which calls ended."""
    data = {
        "format": FORMAT,
        "fields": [each.name for each in dataclasses.fields(Span)],
        "ranks": [
            {"rank": rank, "spans": [dataclasses.astuple(span) for span in spans[rank]]} for rank in sorted(spans)
        ],
    }
    replace_file(directory / SPANS, (json.dumps(data, separators=(",", ":")) + "\n").encode())


def load_spans(path: Path) -> dict[int, list[Span]]:
    """Read spans.json: the spans of each rank.

    Raises:
        ConfigError: when it is not there, damaged, or something else.
    """
    data = _load(path)
    kinds = list(get_type_hints(Span).values())
    try:
        if not isinstance(data, dict) or (data.get("format"), data.get("fields")) != (
            FORMAT,
            [each.name for each in dataclasses.fields(Span)],
        ):
            raise ValueError("format or fields are others than this version's")
        spans: dict[int, list[Span]] = {}
        for place, entry in enumerate(_list(data.get("ranks"), dict, "ranks")):
            rank = checked(entry.get("rank"), int, f"ranks[{place}].rank")
            rows = _list(entry.get("spans"), list, f"ranks[{place}].spans")
            spans[rank] = [_span(row, kinds, f"ranks[{place}].spans[{number}]") for number, row in enumerate(rows)]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return spans


def _list(value: Any, kind: type, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise ValueError(f"{where} is not a list of what belongs there")
    return value


def _span(row: list[Any], kinds: list[Any], where: str) -> Span:
    if len(row) != len(kinds):
        raise ValueError(f"{where} has {len(row)} fields, not {len(kinds)}")
    for value, kind in zip(row, kinds, strict=True):
        if not fits(value, kind):
            raise ValueError(f"{where} holds {value!r} where {kind.__name__} belongs, of 64 bits or to be printed")
    span = Span(*row)
    if span.end_ns < span.start_ns or min(span.exposed_ns, span.num_bytes, span.message_bytes) < 0:
        raise ValueError(f"{where} ends before it begins, or counts less than nothing")
    return span


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__}); a profile is a "
        f"directory with {REPORT} and {SPANS} in it; give one that `mempar profile ... --out DIR` wrote."
    )


def _damaged(path: Path, error: Exception) -> ConfigError:
    what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:_LONGEST_REASON]
    return ConfigError(
        f"{path} is damaged or something else: {what}; it is what `mempar profile` wrote, unchanged; make it anew."
    )
