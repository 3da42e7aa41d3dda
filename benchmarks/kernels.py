"""Every operation of memory layers at the shapes of the recipes: right first, then timed, in one table.

    python benchmarks/kernels.py [--device cuda] [--shapes 134m 1.3b 8b] [--only NAME ...]
                                 [--baseline FILE.py:FUNCTION] [--out FILE.json]

A row is an operation: median, 20th and 80th percentile of single calls, what they reach in TB/s or TFLOP/s, the share
of the roofline that a copy and a matmul reach in the same run, and how many times as long torch takes. Nothing is timed
whose result is wrong, and the exit status is then 1; what changes its inputs is compared on a small sample, and whole
steps are not compared here but by `make test-gpu`. A baseline is a function of an operation's name and its inputs by
name; it returns a function to be timed, or None where it has no such operation.
"""

import argparse
import importlib
import json
import runpy
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
LOOKUPS = {"layer": layer_contests, "slots": slot_contests, "34b": large_table_contest}
# Of the device's memory that a table may take.
TABLE_SHARE = 0.4
COLUMNS = ("shape", "operation", "ms", "p20", "p80", "TB/s", "TFLOP/s", "roofline", "rival", "times as long", "error")

Baseline = Callable[[str, dict[str, Any]], Callable[[], object] | None]


def contests(
    names: list[str], shape: Shape, backend: Backend, device: torch.device, table_bytes: int
) -> Iterator[Contest]:
    """Yield the contests of some operations and lookups."""
    for name in names:
        if name in LOOKUPS:
            yield from LOOKUPS[name](shape, backend, device, table_bytes)
        else:
            bench = importlib.import_module(f"mempar.kernels.{name}.bench")
            yield from bench.contests(shape, backend, device, table_bytes)


def hold(contest: Contest, device: torch.device, baseline: Baseline | None) -> dict[str, Any]:
    """Compare a contest's results, and time its sides if they agree."""
    error = largest_error(contest)
    row: dict[str, Any] = {"operation": contest.name, "error": error, "tolerance": contest.tolerance}
    if error is not None and not error <= contest.tolerance:
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
        table.add_row(*cells, "not compared" if row["error"] is None else f"{row['error']:.1e}")
    console.print(table)


def load_baseline(where: str) -> Baseline:
    """Load FILE.py:FUNCTION."""
    path, _, name = where.rpartition(":")
    try:
        function = runpy.run_path(path)[name]
    except (OSError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{where} is not FILE.py:FUNCTION ({error})") from None
    if not callable(function):
        raise argparse.ArgumentTypeError(f"{name} of {path} is not a function")
    return function


def main() -> int:
    """Measure, print, save; 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="by default all that suit the device")
    parser.add_argument("--only", nargs="+", choices=[*OPERATIONS, *LOOKUPS], help="by default all of them")
    parser.add_argument("--baseline", type=load_baseline, metavar="FILE.py:FUNCTION", help="another implementation")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend = choose_backend("auto", device.type)
    shapes = arguments.shapes or (["cpu"] if device.type == "cpu" else [name for name in SHAPES if name != "cpu"])
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8 << 30
    console = Console(width=None if sys.stdout.isatty() else 160)
    figures: dict[str, Any] = {**describe_machine(), "backend": backend.name, "roofline": {}, "rows": []}
    torch.manual_seed(1)
    for shape in map(SHAPES.__getitem__, shapes):
        roofline = measure_roofline(device, shape.dtype)
        figures["roofline"][shape.name] = {
            "tb_per_s": roofline.bytes_per_s / 1e12,
            "tflop_per_s": roofline.flops_per_s / 1e12,
        }
        only = arguments.only or [*OPERATIONS, *LOOKUPS]
        for contest in contests(only, shape, backend, device, int(TABLE_SHARE * memory)):
            row = with_roofline(hold(contest, device, arguments.baseline), contest, roofline)
            figures["rows"].append({"shape": shape.name, **row})
            milliseconds = f"{row['seconds']['median'] * 1e3:.3f} ms" if "seconds" in row else "WRONG"
            console.print(f"[dim]{shape.name}: {contest.name}: {milliseconds}[/dim]")
            # Its tables make room for the next one's.
            del contest
            # What was measured is kept, whatever comes of the next.
            if arguments.out:
                arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures["rows"], console)
    return int(any("seconds" not in row for row in figures["rows"]))


if __name__ == "__main__":
    sys.exit(main())
