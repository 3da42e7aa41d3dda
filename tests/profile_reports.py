"""Made-up profiles, as `mempar profile` would write them: spans of a schedule, and the rows that are their sums."""

import random
from collections import defaultdict
from typing import Any

from mempar.marks import Span
from mempar.tools.profile.report import CeilingPoint, ProfiledRun, Report, Row, TableReads

# (phase, group, microseconds, bytes sent by a rank)
FORWARD = [
    ("query", "", 400, 0),
    ("topk", "", 900, 0),
    ("route", "", 300, 0),
    ("split_sizes", "mp", 60, 56),
    ("entries", "mp", 500, 900_000),
    ("gather", "", 1500, 0),
    ("values", "mp", 2600, 12_000_000),
    ("gate", "", 250, 0),
]
BACKWARD = [
    ("gate_backward", "", 400, 0),
    ("output_grads", "mp", 2500, 12_000_000),
    ("gather_backward", "", 2400, 0),
    ("score_grads", "mp", 450, 450_000),
    ("topk_backward", "", 700, 0),
    ("query_backward", "", 800, 0),
]
UPDATE = [("reduce_rows", "", 1800, 0), ("copy_sync", "copies", 1400, 3_000_000), ("row_update", "", 2100, 0)]
ENGINE = [("reduce_scatter/dp", "dp", 3000, 20_000_000), ("all_gather/dp", "dp", 1500, 10_000_000)]
LAYERS = (4, 12, 20)
STEPS, MICRO_BATCHES = 3, 2


def made_up_profile(
    world_size: int,
    *,
    memory: bool = True,
    layers: tuple[int, ...] = LAYERS,
    name: str = "made-up",
    table: str = "table0",
) -> tuple[Report, dict[int, list[Span]]]:
    """A report and its spans: several ranks, the last but one slower than the others."""
    spans = _spans_of(world_size, layers if memory else ())
    rows = [row for rank, of in spans.items() for row in _rows_of(rank, of)]
    tables = [_reads_of(table, rank, world_size) for rank in range(world_size if memory else 0)]
    last, first = (max(span.end_ns for of in spans.values() for span in of), 10**12) if rows else (10**12, 10**12)
    run = _run(world_size, name, (last - first) / STEPS / 1e9)
    return Report(run=run, rows=rows, tables=tables, ceiling=_ceiling(world_size)), spans


def _spans_of(world_size: int, layers: tuple[int, ...]) -> dict[int, list[Span]]:
    """Spans of all ranks: who comes to a collective early waits for the others."""
    rng = random.Random(world_size)
    slow = [1.25 if rank == world_size - 2 else rng.uniform(1.0, 1.03) for rank in range(world_size)]
    now = [10**12 + 1000 * rank for rank in range(world_size)]
    found: dict[int, list[Span]] = {rank: [] for rank in range(world_size)}

    def pause(nanoseconds: int) -> None:
        for rank in range(world_size):
            now[rank] += int(nanoseconds * slow[rank] * rng.uniform(0.97, 1.03))

    def mark(step: int, layer: int, micro_batch: int, phase: tuple[str, str, int, int]) -> None:
        name, group, microseconds, num_bytes = phase
        if group and world_size == 1:
            return
        met = max(now) + int(1000 * microseconds * rng.uniform(0.9, 1.15))
        for rank in range(world_size):
            start = now[rank]
            end = met if group else start + int(1000 * microseconds * slow[rank] * rng.uniform(0.95, 1.1))
            hidden = rng.uniform(0.4, 0.9) if group == "dp" else 0.0
            exposed = int((end - start) * (1 - hidden)) if group else 0
            found[rank].append(Span(step, layer, micro_batch, name, group, start, end, exposed, num_bytes, num_bytes))
            now[rank] = end + rng.randrange(20_000)

    for step in range(1, STEPS + 1):
        for micro_batch in range(MICRO_BATCHES):
            for layer in layers:
                pause(4_000_000)
                for phase in FORWARD:
                    mark(step, layer, micro_batch, phase)
            for layer in reversed(layers):
                pause(7_000_000)
                for phase in BACKWARD:
                    mark(step, layer, micro_batch, phase)
        for phase in ENGINE:
            mark(step, -1, -1, phase)
        for phase in UPDATE if layers else []:
            mark(step, -1, -1, phase)
        pause(4_000_000)
    return found


def _rows_of(rank: int, spans: list[Span]) -> list[Row]:
    sums: defaultdict[tuple[int, int, str, str], list[Span]] = defaultdict(list)
    for span in spans:
        sums[span.step, span.layer, span.phase, span.group].append(span)
    rows = []
    for (step, layer, phase, group), of in sums.items():
        nanoseconds = sum(span.end_ns - span.start_ns for span in of)
        exposed, num_bytes = sum(span.exposed_ns for span in of), sum(span.num_bytes for span in of)
        rows.append(
            Row(
                rank=rank,
                step=step,
                layer=layer,
                phase=phase,
                group=group,
                calls=len(of),
                bytes_predicted=num_bytes if group and "/" not in phase else None,
                bytes_measured=num_bytes,
                microseconds=nanoseconds / 1e3,
                algorithm_gb_per_s=num_bytes / nanoseconds,
                bus_gb_per_s=num_bytes / nanoseconds,
                exposed_us=exposed / 1e3,
                overlapped_us=(nanoseconds - exposed) / 1e3 if group else 0.0,
            )
        )
    return rows


def _reads_of(table: str, rank: int, world_size: int) -> TableReads:
    rng = random.Random(rank)
    histogram = [[1 << power, max(1, int(40_000 * 0.42**power * rng.uniform(0.9, 1.1)))] for power in range(11)]
    return TableReads(
        table=table,
        rank=rank,
        num_rows=100_000,
        rows_read=int(400_000 * rng.uniform(0.8, 1.1) * (1.5 if rank == 0 and world_size > 1 else 1.0)),
        unique_rows=sum(rows for _, rows in histogram),
        top_share=rng.uniform(0.2, 0.3),
        histogram=histogram,
    )


def _ceiling(world_size: int) -> list[CeilingPoint]:
    points = []
    for place, (group, collective) in enumerate((("dp", "all_reduce"), ("mp", "all_to_all"), ("copies", "all_to_all"))):
        for size in (4096, 32768, 262144, 2097152, 12_000_000) if world_size > 1 else ():
            microseconds = 40 + 15 * place + size / (9e3 - 2e3 * place)
            points.append(
                CeilingPoint(
                    group=group,
                    collective=collective,
                    ranks=world_size,
                    message_bytes=size,
                    microseconds=microseconds,
                    gb_per_s=size / microseconds / 1e3,
                    latency_us=40.5 + 15 * place,
                )
            )
    return points


def _run(world_size: int, name: str, seconds_per_step: float) -> ProfiledRun:
    config: dict[str, Any] = {
        "name": name,
        "train": {"steps": STEPS, "dtype": "bf16", "recompute": "none"},
        "memory": {"layers": list(LAYERS), "num_subkeys": 1024, "optimizer": "row_adam"},
        "data": {"paths": [], "weights": None, "shuffle": True},
    }
    return ProfiledRun(
        name=name,
        config=config,
        world_size=world_size,
        layout={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": world_size, "mp": world_size, "mp_rows": 1},
        group_sizes={"mp": world_size, "dp": world_size},
        tokens_per_step=131072,
        steps=STEPS,
        seconds_per_step=seconds_per_step,
        marks_per_step=100,
        mark_us=0.9,
        mark_cost_share=0.0006,
        versions={"mempar": "0.7", "torch": "2.13.0", "megatron-core": "0.16.1", "Python": "3.11.7"},
        commit="0123456789abcdef",
        date="2026-11-22 10:00:00+00:00",
        device="16 CPU cores",
    )
