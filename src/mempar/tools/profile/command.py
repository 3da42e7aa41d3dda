"""`mempar profile`: train a few steps with marks on, and write and say where their time went."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mempar
from mempar.errors import ConfigError, MemparError
from mempar.marks import Span
from mempar.recipes import find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.local import launch_local
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.overrides import override, to_yaml
from mempar.runtime.placement import place
from mempar.runtime.preflight import check_layout
from mempar.runtime.profile.rank import REQUEST
from mempar.runtime.profile.recording import Recording
from mempar.tools.launch.provenance import source_tree
from mempar.tools.profile.advice import advice
from mempar.tools.profile.merge import merge_rows, merge_tables
from mempar.tools.profile.page import PAGE, write_page
from mempar.tools.profile.report import CeilingPoint, ProfiledRun, Report, save_report, save_spans
from mempar.tools.profile.summary import say_summary
from mempar.tools.profile.trace import save_trace
from mempar.tools.run_start import with_data

_RANK = "mempar.runtime.profile.rank"
CONFIG = "config.yaml"
# Inside the directory in which the ranks run: the profile, until it is whole.
_WRITTEN = "profile"


def profile(
    recipe: str,
    assignments: list[str],
    *,
    num_ranks: int | None,
    num_steps: int,
    out: Path | None,
    say: Callable[[str], None],
) -> Report:
    """Profile a recipe on this machine.

    Args:
        recipe: name, YAML file or module:function.
        assignments: `KEY=VALUE` overrides.
        num_ranks: processes; None takes the fewest that the layout can run on.
        num_steps: to measure, after one that is not.
        out: directory to make.
        say: prints a line.

    Raises:
        ConfigError: for bad input, before anything is started.
        MemparError: when a rank failed, or the run was ended; nothing is left then.
    """
    if out is None:
        raise ConfigError("--out is missing: a profile is written into a directory of its own; add --out DIR.")
    if num_steps < 1:
        raise ConfigError(f"--steps {num_steps} measures nothing; a profile needs at least one step; raise it.")
    run = override(find_recipe(recipe), assignments)
    ranks = num_ranks if num_ranks is not None else run.parallel.smallest_world
    run = check_layout(run, ranks)
    out = _free(out)
    run = with_data(run, say)
    try:
        with _working_directory(out) as working, sigterm_raises():
            recordings = _record(run, ranks, num_steps, out, working, say)
            report = make_report(run, recordings)
            spans = {recording.rank: recording.spans for recording in recordings}
            with _writing(out):
                written = _write(working / _WRITTEN, run, report, spans, say)
                # At once and last: whoever finds a profile finds all of it.
                os.replace(working / _WRITTEN, out)
    except Terminated:
        raise MemparError("ended by SIGTERM before all was written; nothing is left; start it again.") from None
    say_summary(report, [*advice(run, recordings, report)], say)
    say(f"written to {out}: {written}")
    return report


def _free(out: Path) -> Path:
    """The whole path of a directory that is not there, or empty."""
    try:
        out = out.resolve()
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    # Links that lead to each other are a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{out} cannot be looked at ({getattr(error, 'strerror', None) or error}); a profile needs a directory of "
            "its own; choose another --out."
        ) from None
    if not free:
        raise ConfigError(
            f"{out} exists and is not an empty directory; a profile needs a directory of its own; choose another --out."
        )
    return out


@contextmanager
def _working_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out`, on its file system, which is gone afterwards."""
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _record(
    run: RunConfig, num_ranks: int, num_steps: int, out: Path, working: Path, say: Callable[[str], None]
) -> list[Recording]:
    """Run the ranks in a directory of their own."""
    with _writing(out):
        replace_file(working / CONFIG, to_yaml(run).encode())
        (working / REQUEST).write_text(json.dumps({"steps": num_steps}))
    with RunLock(working, say):
        say(f"{run.name} on {num_ranks} rank(s), {num_steps} steps after one to warm up")
        launch_local(working, num_ranks, None, say, worker=_RANK)
    try:
        return [Recording.load(working, rank) for rank in range(num_ranks)]
    except FileNotFoundError:
        raise MemparError("the ranks ended before all was measured; nothing is left; start it again.") from None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); a profile needs a writable directory with room; make room "
            "there, or choose another --out."
        ) from None


def _write(
    directory: Path, run: RunConfig, report: Report, spans: dict[int, list[Span]], say: Callable[[str], None]
) -> str:
    """Write all files, report.json before the page, which is the one that may be left out.

    Returns:
        What there is now.
    """
    directory.mkdir(exist_ok=True)
    replace_file(directory / CONFIG, to_yaml(run).encode())
    save_spans(spans, directory)
    save_trace(spans, directory)
    save_report(report, directory)
    written = "report.json, spans.json, and trace.json for ui.perfetto.dev"
    try:
        write_page(directory)
    except ConfigError as error:
        say(str(error))
        return written
    return f"{PAGE} for a browser, {written}"


def _printable(value: Any) -> Any:
    """Write control characters in texts, as paths may have them, so that they can be shown: a report has none."""
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, str) and not value.isprintable():
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in value)
    return value


def make_report(run: RunConfig, recordings: Sequence[Recording]) -> Report:
    """Put the recordings of all ranks together.

    Args:
        run: resolved.
        recordings: of all ranks, in order.
    """
    grid = place(run, len(recordings)).grid
    steps = len(recordings[0].seconds)
    seconds = statistics.median(max(recording.seconds[step] for recording in recordings) for step in range(steps))
    marks = max(len(recording.spans) for recording in recordings) // steps
    mark_us = max(recording.mark_us for recording in recordings)
    sizes: dict[str, int] = {}
    for recording in recordings:
        for name, size in recording.group_sizes.items():
            sizes[name] = max(size, sizes.get(name, 1))
    flags = {name: int(getattr(run.parallel, name)) for name in ("sequence_parallel", "distributed_optimizer")}
    layout = {name: size for name, size in grid.sizes.items() if name not in ("world", "mp_columns")}
    return Report(
        run=ProfiledRun(
            name=_printable(run.name),
            # As JSON has it, tuples are lists.
            config=_printable(json.loads(json.dumps(dataclasses.asdict(run)))),
            world_size=len(recordings),
            layout={**layout, "vpp": run.parallel.vpp, **flags},
            group_sizes=sizes,
            tokens_per_step=run.train.global_batch_size * run.train.seq_length,
            steps=steps,
            seconds_per_step=seconds,
            marks_per_step=marks,
            mark_us=mark_us,
            mark_cost_share=marks * mark_us / 1e6 / seconds,
            versions={
                "mempar": mempar.__version__,
                **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
                "python": platform.python_version(),
            },
            commit=source_tree(Path(mempar.__file__).resolve().parent).commit,
            date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            device=recordings[0].device,
        ),
        rows=merge_rows(run, recordings),
        tables=merge_tables(recordings),
        ceiling=[CeilingPoint(**point) for point in recordings[0].ceiling],
    )
