"""The results of `mempar eval`, for people and for programs."""

import io
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import xxhash
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mempar import __version__
from mempar.runtime.checkpoint.manifest import WEIGHTS, Manifest
from mempar.tools.evaluate.published import CAVEATS, METRICS, SOURCE, Published, published_for
from mempar.tools.evaluate.request import Request, Results

_PACKAGES = ("torch", "megatron-core", "lm-eval", "datasets", "transformers", "tokenizers", "numpy")
# Wide enough for any table: terminals wrap, and files do not care.
_WIDTH = 200
# What the harness says of a task beside its metrics.
_ABOUT = ("name", "alias", "sample_len", "sample_count")


def weights_digest(manifest: Manifest) -> str:
    """A digest of all weights that no layout changes: two checkpoints with the same one answer alike."""
    named = sorted((name, record.digest) for name, record in manifest.tensors.items() if record.kind == WEIGHTS)
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {digest:016x}\n" for name, digest in named).encode())


def document(results: Results, request: Request) -> dict[str, Any]:
    """All that was found, as plain JSON: what --out writes."""
    manifest, run = results.manifest, results.run
    settings = {name: value for name, value in asdict(request).items() if name not in ("checkpoint", "out")}
    return {
        "checkpoint": {
            "path": str(results.checkpoint.resolve()),
            "run": run.name,
            "step": manifest.step,
            "tokens": manifest.progress.get("tokens"),
            "weights_digest": weights_digest(manifest),
            "seq_length": run.train.seq_length,
            "dtype": run.train.dtype,
            "tokenizer": run.data.tokenizer,
        },
        "settings": settings | {"task_dir": [str(folder) for folder in request.task_dir]},
        "tasks": _task_document(results.tasks or {}),
        "data": [
            asdict(loss) | {"nats_per_token": loss.nats_per_token, "bits_per_byte": loss.bits_per_byte}
            for loss in results.losses
        ],
        "published": [{"model": one.model, "source": SOURCE, **asdict(one)} for one in _beside(results)],
        "notes": results.notes,
        "versions": {"mempar": __version__, **_versions()},
    }


def loss_lines(results: Results) -> Iterator[str]:
    """What was evaluated, and the table of losses, line by line."""
    manifest, run = results.manifest, results.run
    yield f"{run.name}, step {manifest.step}: {results.checkpoint}"
    if results.losses:
        yield from _drawn(_loss_table(results))


def task_lines(results: Results) -> Iterator[str]:
    """The table of tasks, line by line, and what is to be said of all that was found."""
    if results.tasks is not None:
        yield from _drawn(_task_table(results, results.tasks))
        if _beside(results):
            yield f"published: {SOURCE}; it does not say how many examples its prompts have"
            shown = set(results.tasks["results"])
            yield from (f"- {text}" for task, text in CAVEATS.items() if task in shown)
    yield from (f"- {note}" for note in results.notes)


def _task_document(tasks: dict[str, Any]) -> dict[str, Any]:
    """Metrics, versions, examples and questions of every task and group; plain numbers."""
    shots, counts = tasks.get("n-shot", {}), tasks.get("n-samples", {})
    return {
        name: {
            "metrics": {f"{metric},{how}": value for metric, how, value, _ in _metrics(own)},
            "stderr": {f"{metric},{how}": error for metric, how, _, error in _metrics(own)},
            "num_fewshot": shots.get(name),
            "questions": counts.get(name, {}).get("effective"),
            "all_questions": counts.get(name, {}).get("original"),
            "version": tasks.get("versions", {}).get(name),
        }
        for name, own in tasks.get("results", {}).items()
    }


def _metrics(own: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Metric, the filter before it, value and standard error."""
    for key, value in own.items():
        metric, _, how = key.partition(",")
        if key in _ABOUT or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = own.get(f"{metric}_stderr,{how}")
        yield metric, how, float(value), float(error) if isinstance(error, int | float) else None


def _loss_table(results: Results) -> Table:
    table = Table("data", box=None, pad_edge=False)
    for heading in ("windows", "tokens", "nats a token", "bits a byte"):
        table.add_column(heading, justify="right")
    for loss in results.losses:
        windows = f"{loss.windows:,}" + (f" of {loss.all_windows:,}" if loss.windows < loss.all_windows else "")
        bits = "not known" if loss.bits_per_byte is None else f"{loss.bits_per_byte:.4f}"
        table.add_row(Text(loss.data), windows, f"{loss.tokens:,}", f"{loss.nats_per_token:.4f}", bits)
    return table


def _task_table(results: Results, tasks: dict[str, Any]) -> Table:
    beside = _beside(results)
    table = Table("task", "metric", box=None, pad_edge=False)
    for heading in ("value", "stderr", "shots", "questions", *(f"published {one.model}" for one in beside)):
        table.add_column(heading, justify="right")
    shots, counts = tasks["n-shot"], tasks["n-samples"]
    for name in _shown(results.asked, tasks):
        first = True
        for metric, how, value, error in _metrics(tasks["results"][name]):
            known = [one.figures.get(name) if METRICS.get(name) == metric else None for one in beside]
            count = counts.get(name, {}).get("effective")
            table.add_row(
                Text(name if first else ""),
                Text(metric if how in ("", "none") else f"{metric} ({how})"),
                f"{value:.4f}",
                "" if error is None else f"± {error:.4f}",
                str(shots.get(name, "")) if first else "",
                f"{count:,}" if first and count is not None else "",
                *("" if figure is None else f"{figure / 100:.4f}" for figure in known),
            )
            first = False
    return table


def _shown(asked: list[str], tasks: dict[str, Any]) -> list[str]:
    """What the table has: tasks, groups that have a figure of their own, and the members of others."""
    found: list[str] = []
    for name in asked:
        members = tasks.get("group_subtasks", {}).get(name, [])
        has_figures = name in tasks["results"] and any(True for _ in _metrics(tasks["results"][name]))
        found += [name] if has_figures else _shown(list(members), tasks)
    return list(dict.fromkeys(found))


def _beside(results: Results) -> list[Published]:
    shown = (results.tasks or {}).get("results", {})
    return [one for one in published_for(results.run) if one.figures.keys() & set(shown)]


def _drawn(table: Table) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None).print(table)
    return [line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n")]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
