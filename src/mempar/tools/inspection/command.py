"""`mempar inspect`: find, and show or write what was found."""

import dataclasses
import datetime
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.mapping import check_table, map_table
from mempar.runtime.named_path import is_directory, status_of
from mempar.tools.bars import Begin, counting_bars
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.inspection.findings import Inspection, MemoryFindings, TextFindings
from mempar.tools.inspection.history import history_name, read_history
from mempar.tools.inspection.lookups import read_windows
from mempar.tools.inspection.overlap import overlap
from mempar.tools.inspection.page.document import draw, render_page
from mempar.tools.inspection.reads import TextReads
from mempar.tools.inspection.report import report
from mempar.tools.inspection.row_blocks import rows_wanted
from mempar.tools.inspection.rows import read_rows
from mempar.tools.inspection.texts import Asked, Texts, Windows, check_asked, printable
from mempar.tools.page.svg import need_matplotlib

if TYPE_CHECKING:
    from mempar.runtime.inference.opened import OpenedModel

PAGE, PICTURE, FINDINGS = "inspection.html", "inspection.png", "inspection.json"
# Of a text in lists, the slots of most weight, for the heat map on the page.
_SLOTS = 24


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; see options.py."""

    checkpoint: Path
    texts: tuple[Asked, ...] = ()
    samples: int = 32
    rows: str = ""
    memory: str = ""
    top: int = 5
    as_json: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("samples", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1; raise it.")
        if self.rows not in ("", "all") and not (self.rows.isascii() and self.rows.isdigit() and int(self.rows)):
            raise ConfigError(f"--rows {self.rows} is neither a number of at least 1 nor `all`; give one of these.")

    @property
    def row_limit(self) -> int:
        """Rows of each table to look at; 0 for all."""
        return 0 if self.rows == "all" else int(self.rows)


def inspect(request: Request, say: Callable[[str], None]) -> None:
    """Inspect a checkpoint.

    Args:
        request: what is asked for.
        say: prints a text.

    Raises:
        ConfigError: for what is no checkpoint, has no memory or not the one asked for, and texts that cannot be read.
    """
    check_asked(request.texts)
    if request.out is not None:
        need_matplotlib(PAGE, "or leave --out away: tables and --json need none of it")
        if status_of(request.out, "--out") is not None and not is_directory(request.out, "--out"):
            raise _no_directory(request.out, "it is no directory")
    source = CheckpointSource(find_checkpoint(request.checkpoint))
    memories = _memories(source, request.memory)
    with counting_bars() as begin:
        texts, found = _look(request, source, memories, begin)
    inspection = Inspection(
        checkpoint=printable(str(source.root)),
        run=printable(source.run.name),
        step=source.manifest.step,
        seed=source.run.train.seed,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        texts=texts,
        memories=found,
    )
    if request.out is not None:
        _write(request.out, inspection, source.run)
    say(json.dumps(inspection.as_json(), indent=2) if request.as_json else report(inspection, request.top))
    if request.out is not None and not request.as_json:
        say(f"{request.out / PAGE} for a browser, {PICTURE} and {FINDINGS} beside it")


def _memories(source: CheckpointSource, wanted: str) -> list[str]:
    """The names of the memories to be looked at."""
    names = list(source.run.memories)
    if not names:
        raise ConfigError(
            f"{source.root} has no memory: its run is {source.run.name} with memory.enabled=false; memories are what "
            "is looked at here; name a checkpoint of a run that has one."
        )
    if not wanted:
        return names
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names
        raise ConfigError(
            f"--memory {wanted}: {source.root} has no memory of this name; its memories are numbered in their order in "
            f"the model; use {' or '.join(near)}."
        )
    return [wanted]


def _look(
    request: Request, source: CheckpointSource, memories: list[str], begin: Begin
) -> tuple[list[TextFindings], list[MemoryFindings]]:
    """Look at rows, then let the model read; texts that cannot be read are told before either."""
    of_run = Texts(source.manifest, source.run)
    windows = [of_run.windows(each, request.samples) for each in request.texts]
    found = [_without_texts(request, source, name, begin) for name in memories]
    if not windows:
        return [], found
    # Megatron is needed for what texts read, and for nothing else.
    from mempar.runtime.inference.opened import open_model

    with open_model(source.root, tables="mapped") as opened:
        reads = []
        for each in windows:
            advance = begin(f"reading {each.name}", len(each.tokens))
            reads.append(read_windows(opened, each.tokens, memories, advance))
        found = [_with_texts(request, opened, memory, [of_text[memory.name] for of_text in reads]) for memory in found]
    return [_text(each) for each in windows], found


def _without_texts(request: Request, source: CheckpointSource, name: str, begin: Begin) -> MemoryFindings:
    config, history, rows = source.run.memories[name], None, []
    if stored := history_name(source, name):
        history = read_history(source, name, begin(f"history of {name}", rows_wanted(source, stored)))
    for table in (f"{name}.{part}" for part in config.table_names) if request.rows else ():
        check_table(source.manifest, table, (config.num_slots, source.run.value_dim_of(config)))
        advance = begin(f"rows of {table}", rows_wanted(source, table, request.row_limit))
        rows.append(read_rows(source, table, advance, request.row_limit))
    return MemoryFindings(
        name=name,
        variant=config.variant,
        num_slots=config.num_slots,
        value_dim=source.run.value_dim_of(config),
        heads=config.heads,
        top_k=config.top_k,
        blocks=list(config.layers),
        history=history,
        rows=rows,
        reads=[],
        overlap=None,
    )


def _with_texts(
    request: Request, opened: "OpenedModel", memory: MemoryFindings, reads: list[TextReads]
) -> MemoryFindings:
    found = None
    if len(reads) == 2:
        table = map_table(opened.manifest, f"{memory.name}.values", (memory.num_slots, memory.value_dim))
        found = overlap(reads[0], reads[1], table.gather, memory.value_dim, max(_SLOTS, request.top))
    return dataclasses.replace(
        memory, reads=[each.findings(max(_SLOTS, request.top), request.top) for each in reads], overlap=found
    )


def _text(windows: Windows) -> TextFindings:
    return TextFindings(
        name=windows.name,
        tokens=sum(map(len, windows.tokens)),
        windows=len(windows.tokens),
        left_out=windows.left_out,
        shown=windows.shown,
    )


def _write(out: Path, inspection: Inspection, run: RunConfig) -> None:
    page, picture = render_page(inspection, run).encode(), draw(inspection)
    findings = json.dumps(inspection.as_json(), allow_nan=False).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in ((FINDINGS, findings), (PICTURE, picture), (PAGE, page)):
            replace_file(out / name, content)
    except OSError as error:
        raise _no_directory(out, str(error.strerror)) from None


def _no_directory(out: Path, why: str) -> ConfigError:
    return ConfigError(
        f"--out {out} cannot be written ({why}); it is a directory that is there or can be made; choose another one."
    )
