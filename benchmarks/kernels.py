"""Every operation of memory layers at the shapes of the recipes: right first, then timed, in one table.

    python benchmarks/kernels.py [--device cuda] [--shapes 134m 1.3b 8b] [--only NAME ...]
                                 [--baseline FILE.py:FUNCTION] [--out FILE.json]

A row is an operation: median, 20th and 80th percentile of single calls, what they reach in TB/s or TFLOP/s, the share
of the roofline that a copy and a matmul reach in the same run, and how many times as long torch takes. Nothing is timed
whose result is wrong, and the exit status is then 1. A baseline is a function of an operation's name and its inputs by
name; it returns a function to be timed, or None where it has no such operation.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lookups import large_table_contest, layer_contests, slot_contests
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from mempar.kernels.contest import (
    SHAPES,
    Contest,
    Roofline,
    Shape,
    Times,
    largest_error,
    measure_roofline,
    time_in_turns,
)
from mempar.kernels.dispatch import Backend, choose_backend

OPERATIONS = ("product_topk", "weighted_gather", "reduce_rows", "row_update", "segment_route", "peer")
# Of the device's memory that a table may take.
TABLE_SHARE = 0.4
COLUMNS = ("shape", "operation", "ms", "p20", "p80", "TB/s", "TFLOP/s", "roofline", "rival", "times as long", "error")

Baseline = Callable[[str, dict[str, Any]], Callable[[], object] | None]


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the contests of all operations and of the whole layer."""
    for operation in OPERATIONS:
        yield from importlib.import_module(f"mempar.kernels.{operation}.bench").contests(
            shape, backend, device, table_bytes
        )
    yield from layer_contests(shape, backend, device, table_bytes)
    yield from slot_contests(shape, backend, device, table_bytes)
    if shape.name == "1.3b":
        yield from large_table_contest(backend, device)


def hold(contest: Contest, device: torch.device, baseline: Baseline | None) -> dict[str, Any]:
    """Compare a contest's results, and time its sides if they agree."""
    error = largest_error(contest)
    row: dict[str, Any] = {"operation": contest.name, "error": error, "tolerance": contest.tolerance}
    if not error <= contest.tolerance:
        return row
    sides = {"ours": contest.ours, **contest.rivals}
    other = baseline(contest.name, contest.inputs) if baseline is not None else None
    if other is not None:
        sides["baseline"] = other
    times = time_in_turns(sides, device)
    ours = times["ours"]
    return {
        **row,
        "seconds": {"median": ours.median, "p20": ours.quantile(0.2), "p80": ours.quantile(0.8)},
        "bytes": contest.num_bytes,
        "flops": contest.num_flops,
        "rivals": {name: _against(ours, of_rival) for name, of_rival in times.items() if name != "ours"},
    }


def _against(ours: Times, rival: Times) -> dict[str, float]:
    return {"median": rival.median, "times_as_long": rival.median / ours.median}


def with_roofline(row: dict[str, Any], contest: Contest, roofline: Roofline) -> dict[str, Any]:
    """Add what was reached to a timed row."""
    if "seconds" not in row:
        return row
    median = row["seconds"]["median"]
    return {
        **row,
        "tb_per_s": contest.num_bytes / median / 1e12,
        "tflop_per_s": contest.num_flops / median / 1e12,
        "share_of_roofline": roofline.seconds(contest) / median,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(*COLUMNS)
    for row in rows:
        cells = [row["shape"], row["operation"]]
        if "seconds" in row:
            cells += [f"{row['seconds'][name] * 1e3:.3f}" for name in ("median", "p20", "p80")]
            cells += [f"{row['tb_per_s']:.3f}", f"{row['tflop_per_s']:.1f}", f"{row['share_of_roofline']:.0%}"]
            cells += ["\n".join(row["rivals"])]
            cells += ["\n".join(f"{rival['times_as_long']:.2f}" for rival in row["rivals"].values())]
        else:
            cells += ["WRONG"] + [""] * 7
        table.add_row(*cells, f"{row['error']:.1e}")
    console.print(table)


def load_baseline(where: str) -> Baseline:
    """Load FILE.py:FUNCTION."""
    path, _, name = where.rpartition(":")
    spec = importlib.util.spec_from_file_location("baseline", path)
    assert spec is not None and spec.loader is not None, f"{where} is not FILE.py:FUNCTION"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def main() -> int:
    """Measure, print, save; 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="by default all that suit the device")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operations whose names begin so")
    parser.add_argument("--baseline", type=load_baseline, metavar="FILE.py:FUNCTION", help="another implementation")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend = choose_backend("auto", device.type)
    names = arguments.shapes or (["cpu"] if device.type == "cpu" else [name for name in SHAPES if name != "cpu"])
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8 << 30
    console, rows, rooflines = Console(width=None if sys.stdout.isatty() else 160), [], {}
    torch.manual_seed(1)
    for shape in map(SHAPES.__getitem__, names):
        roofline = measure_roofline(device, shape.dtype)
        rooflines[shape.name] = {"tb_per_s": roofline.bytes_per_s / 1e12, "tflop_per_s": roofline.flops_per_s / 1e12}
        for contest in contests(shape, backend, device, int(TABLE_SHARE * memory)):
            if arguments.only and not contest.name.startswith(tuple(arguments.only)):
                continue
            row = with_roofline(hold(contest, device, arguments.baseline), contest, roofline)
            rows.append({"shape": shape.name, **row})
            console.print(f"[dim]{shape.name}: {contest.name}[/dim]")
            # Its tables make room for the next one's.
            del contest
    show(rows, console)
    if arguments.out:
        figures = {**describe_machine(), "backend": backend.name, "roofline": rooflines, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any("seconds" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
