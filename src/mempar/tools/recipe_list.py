"""`mempar recipes`: what can be trained, and how large it is."""

import io
import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mempar.recipes import RECIPES, find_recipe
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.overrides import to_yaml
from mempar.runtime.size import model_size


def show(name: str | None, *, as_json: bool) -> str:
    """Return a recipe's resolved config as YAML, or the list of all recipes as a table or JSON."""
    if name is not None:
        return to_yaml(find_recipe(name)).rstrip()
    rows = []
    for known in RECIPES:
        run = find_recipe(known)
        rows.append({"name": known, **asdict(model_size(run, vocab_size(run))), "gpus": run.parallel.smallest_world})
    if as_json:
        return json.dumps(rows, indent=1)
    table = Table("recipe", "parameters", "active", "in the table", "MFLOP a token", "ranks")
    for row in rows:
        counts = [f"{row[key] / 1e6:.2f}M" for key in ("total_params", "active_params", "memory_params")]
        table.add_row(row["name"], *counts, f"{row['flops_per_token'] / 1e6:.1f}", str(row["gpus"]))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue().rstrip()
