"""From the recordings of all ranks to the rows of a report."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from mempar.marks import Span
from mempar.runtime.config import RunConfig
from mempar.runtime.profile.recording import Recording, ShardReads
from mempar.tools.profile.predicted import PREDICTED, PhaseKey, predicted_bytes
from mempar.tools.profile.report import Row, TableReads

# Rows of which the share of all reads is told.
TOP_SHARE = 0.01


def merge_rows(run: RunConfig, recordings: Sequence[Recording]) -> list[Row]:
    """Sum up the calls of each phase, and set what was predicted beside it.

    Args:
        run: resolved.
        recordings: of all ranks, in order.

    Returns:
        Rows by rank, step, layer, and then in the order in which phases first ended; last those of which bytes were
        predicted and no call was seen.
    """
    predicted = predicted_bytes(run, recordings)
    rows = []
    for recording in recordings:
        calls: dict[tuple[PhaseKey, str], list[Span]] = defaultdict(list)
        for span in recording.spans:
            key = PhaseKey(rank=recording.rank, step=span.step, layer=span.layer, phase=span.phase)
            calls[key, span.group].append(span)
        for (key, group), spans in calls.items():
            size = recording.group_sizes.get(group, 1)
            rows.append(_row(key, group, spans, size, predicted[key] if key.phase in PREDICTED else None))
    seen = {PhaseKey(rank=row.rank, step=row.step, layer=row.layer, phase=row.phase) for row in rows}
    rows += [
        _row(key, PREDICTED[key.phase], [], 1, num_bytes)
        for key, num_bytes in predicted.items()
        if num_bytes and key not in seen
    ]
    # Stable: phases stay in their order.
    return sorted(rows, key=lambda row: (row.rank, row.step, row.layer))


def _row(key: PhaseKey, group: str, spans: list[Span], group_size: int, predicted: int | None) -> Row:
    nanoseconds = sum(span.end_ns - span.start_ns for span in spans)
    exposed = sum(span.exposed_ns for span in spans)
    num_bytes = sum(span.num_bytes for span in spans)
    # Those that nobody waited for have no time, and say nothing of bandwidth.
    timed = [span for span in spans if span.end_ns > span.start_ns]
    timed_bytes, message = sum(span.num_bytes for span in timed), sum(span.message_bytes for span in timed)
    on_the_bus = message * _bus_share(key.phase, group_size) if "/" in key.phase else timed_bytes
    return Row(
        **dataclasses.asdict(key),
        group=group,
        calls=len(spans),
        bytes_predicted=predicted,
        bytes_measured=num_bytes,
        microseconds=nanoseconds / 1e3,
        algorithm_gb_per_s=message / nanoseconds if nanoseconds else 0.0,
        bus_gb_per_s=on_the_bus / nanoseconds if nanoseconds else 0.0,
        exposed_us=exposed / 1e3,
        overlapped_us=(nanoseconds - exposed) / 1e3 if group else 0.0,
    )


def _bus_share(phase: str, group_size: int) -> float:
    """What crosses a rank's link of a message that a group of n shares: the factors of nccl-tests."""
    others = (group_size - 1) / group_size
    kind = phase.partition("/")[0]
    return {"all_reduce": 2 * others, "all_gather": others, "reduce_scatter": others, "all_to_all": others}.get(kind, 1)


def merge_tables(recordings: Sequence[Recording]) -> list[TableReads]:
    """Sum up what was read of every shard."""
    return [_table(reads, recording.rank) for recording in recordings for reads in recording.tables]


def _table(reads: ShardReads, rank: int) -> TableReads:
    served = sum(count * rows for count, rows in reads.rows_by_reads)
    left, top = max(1, round(TOP_SHARE * reads.num_rows)), 0
    bins: dict[int, int] = defaultdict(int)
    for count, rows in reads.rows_by_reads:
        top += count * min(rows, left)
        left -= min(rows, left)
        bins[1 << count.bit_length() - 1] += rows
    return TableReads(
        table=reads.table,
        rank=rank,
        num_rows=reads.num_rows,
        rows_read=served,
        unique_rows=sum(rows for _, rows in reads.rows_by_reads),
        top_share=top / served if served else 0.0,
        histogram=[[bound, bins[bound]] for bound in sorted(bins)],
    )
