"""`mempar recipes`: what can be trained, how large it is, and on what."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mempar.errors import ConfigError
from mempar.recipes import RECIPES, TWINS, find_recipe
from mempar.recipes.data_sets import DATA_SETS
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.estimate import estimate
from mempar.runtime.overrides import to_yaml
from mempar.runtime.placement import place, resolve
from mempar.runtime.size import model_size
from mempar.tools.estimate_table import estimate_table

# Wide enough for every row: a row that is cut is no use, and terminals scroll or wrap.
_WIDTH = 200


def show(name: str | None, *, as_json: bool, tiny: bool = False) -> str:
    """Return a recipe's resolved config as YAML under comments on its sizes, or the list of all recipes.

    Args:
        name: of one recipe; None lists all.
        as_json: list them as JSON, not as a table.
        tiny: list the tiny twins too.

    Raises:
        ConfigError: for a name that is none, with near ones.
    """
    if name is not None:
        run = find_recipe(name)
        return "\n".join([*(f"# {line}" for line in comments(run)), to_yaml(run).rstrip()])
    rows = [describe(find_recipe(known)) for known in [*RECIPES, *(TWINS if tiny else ())]]
    return json.dumps(rows, indent=1) if as_json else _table(rows)


def describe(run: RunConfig) -> dict[str, Any]:
    """Sizes, hardware, layout and length of a run."""
    sizes, ranks = run.parallel, run.num_gpus
    grid = place(resolve(run, ranks), ranks).grid
    layout = {name: getattr(grid, name) for name in ("tp", "pp", "cp", "ep", "mp", "mp_rows", "mp_columns", "dp")}
    return {
        "name": run.name,
        **asdict(model_size(run, vocab_size(run))),
        "gpus": ranks,
        "hardware": run.hardware.gpu or "cpu",
        "tokens": tokens_of(run),
        "global_batch_size": run.train.global_batch_size,
        "seq_length": run.train.seq_length,
        "dtype": run.train.dtype,
        "layout": {**layout, "vpp": sizes.vpp, "mp_hops": sizes.mp_hops},
    }


def tokens_of(run: RunConfig) -> int:
    """Tokens that a run sees."""
    return run.train.steps * run.train.global_batch_size * run.train.seq_length


def comments(run: RunConfig) -> list[str]:
    """What a config does not say of itself: sizes, tokens, where tables lie, and what the data are, a line each."""
    about: list[Callable[[RunConfig], list[str]]] = [_sizes, _tokens, _layout, _memory, _data]
    lines: list[str] = []
    for lines_of in about:
        try:
            lines += lines_of(run)
        except ConfigError as error:
            # A file may name a tokenizer that is not here, or more GPUs than its layout divides.
            lines += [f"not known: {error}".replace("\n", " ")]
    return lines


def _sizes(run: RunConfig) -> list[str]:
    size = model_size(run, vocab_size(run))
    in_tables = f", {short(size.memory_params)} of them in tables" if size.memory_params else ""
    return [
        f"{run.name}: {short(size.total_params)} parameters{in_tables}; {short(size.active_params)} active",
        f"{size.flops_per_token / 1e9:.3g} GFLOP a token, forward and backward",
    ]


def _tokens(run: RunConfig) -> list[str]:
    step = run.train.global_batch_size * run.train.seq_length
    return [f"{short(tokens_of(run))} tokens in {run.train.steps} steps of {short(step)}"]


def _layout(run: RunConfig) -> list[str]:
    row = describe(run)
    where = f"{row['gpus']} {row['hardware']}: {layout_text(row['layout'])}"
    return [f"{where}; {place(resolve(run, row['gpus']), row['gpus']).reason}"]


def _memory(run: RunConfig) -> list[str]:
    ranks = run.num_gpus
    return estimate_table(estimate(resolve(run, ranks), ranks), run.hardware.kind).splitlines()


def _data(run: RunConfig) -> list[str]:
    weights = run.data.weights or (None,) * len(run.data.paths)
    lines = []
    for path, weight in zip(run.data.paths, weights, strict=True):
        known = DATA_SETS.get(Path(path).name)
        if known is not None:
            share = "" if weight is None else f"{weight:.1%} "
            note = f"; {known.note}" if known.note else ""
            lines.append(f"data: {share}{path} from {known.repository} ({known.license}{note})")
    return lines


def short(number: float) -> str:
    """A count in millions, billions or trillions."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:g}"


def layout_text(layout: dict[str, int]) -> str:
    """The parallel dimensions that there are; a table's as rows x columns."""
    sizes = [f"{name}{layout[name]}" for name in ("tp", "pp", "cp", "ep") if layout[name] > 1]
    if layout["mp"] > 1:
        hops = " in two hops" if layout["mp_hops"] == 2 else ""
        sizes.append(f"mp{layout['mp']}={layout['mp_rows']}x{layout['mp_columns']}{hops}")
    return " ".join([*sizes, f"dp{layout['dp']}"])


def _table(rows: list[dict[str, Any]]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("total", "active", "in tables", "GFLOP a token", "tokens", "GPUs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            *(short(row[key]) for key in ("total_params", "active_params", "memory_params")),
            f"{row['flops_per_token'] / 1e9:.3g}",
            short(row["tokens"]),
            f"{row['gpus']} {row['hardware']}",
            layout_text(row["layout"]),
        )
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
