"""What `mempar generate --bench` measured, as a table for the terminal."""

import io
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mempar.tools.generate.bench import BenchResult

_WIDTH = 110


def bench_table(result: "BenchResult") -> str:
    """Render measurements: a line on what was measured, and tokens/s by phase and batch size."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase")
    for header in ("sequences", "tokens of each", "memory, tokens/s", "dense, tokens/s", "memory / dense", "rounds"):
        table.add_column(header, justify="right")
    for speeds in result.speeds:
        table.add_row(
            speeds.phase,
            str(speeds.batch_size),
            str(speeds.tokens),
            _figure(speeds.memory_per_s),
            _figure(speeds.dense_per_s),
            f"{speeds.ratio:.2f}",
            str(len(speeds.memory_seconds)),
        )
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return f"{_head(result)}\n{text.getvalue().rstrip()}"


def _head(result: "BenchResult") -> str:
    where = "mapped from their files" if result.tables == "mapped" else "in memory"
    flops = result.memory_flops / 1e6, result.dense_flops / 1e6
    return (
        f"{result.checkpoint} on {result.device}, {result.threads} thread(s), {result.dtype}; tables of "
        f"{result.table_bytes / 2**30:.3g} GiB {where}\n"
        f"forward pass of a token: {flops[0]:,.2f} MFLOP; dense, with feed-forward networks of {result.dense_ffn}: "
        f"{flops[1]:,.2f} MFLOP; medians of rounds in turn"
    )


def _figure(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
