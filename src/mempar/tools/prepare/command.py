"""`mempar prepare` from its arguments to PREFIX.bin, PREFIX.idx and PREFIX.json."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mempar.errors import ConfigError, MemparError
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.manifest import DataManifest, read_manifest
from mempar.runtime.data.tokenizer import parse_spec
from mempar.tools.bars import bars
from mempar.tools.prepare import reading
from mempar.tools.prepare.documents import check_unit
from mempar.tools.prepare.encoding import Job, encode_all
from mempar.tools.prepare.inputs import Input, find_inputs
from mempar.tools.prepare.manifest import command_of, describe
from mempar.tools.prepare.partial import Partial, is_finished, occupied, partial_directory

_NUM_REASONS = 5


def prepare(
    inputs: list[str],
    *,
    tokenizer: str,
    out: Path,
    workers: int | None = None,
    form: str | None = None,
    unit: str = "file",
    field: str = "text",
    skip_bad: bool = False,
    say: Callable[[str], None],
) -> DataManifest:
    """Turn text into a .bin/.idx pair with a manifest, or go on where the same command was interrupted.

    Args:
        inputs: files and directories.
        tokenizer: its name, in the grammar of `data.tokenizer`.
        out: path of the result without suffix.
        workers: processes that encode; None takes one a core.
        form: format of all inputs; None tells it by their names.
        unit: what a document of a text file is: file, line or paragraph.
        field: key or column of the text.
        skip_bad: leave bad documents out and count them.
        say: prints a line.

    Raises:
        ConfigError: for bad input; what was done so far stays in PREFIX.partial/.
    """
    num_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers} encodes nothing; at least one process has to; raise it.")
    check_unit(unit)
    prefix = out.expanduser().resolve()
    spec = parse_spec(tokenizer, "--tokenizer")
    sources = find_inputs(inputs, prefix, form)
    # Workers are processes; threads inside each would compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = load_encoder(spec)
    options = {"documents": unit, "field": field, "piece_bytes": reading.PIECE_BYTES}
    wanted = describe(str(spec), encoder, [source.identity for source in sources], options)
    found = _present(prefix, wanted)
    if found is not None:
        say(f"{prefix} is up to date: {_summary(found)}")
        return found
    job = Job(spec=spec, unit=unit, field=field, dtype=wanted.dtype, skip_bad=skip_bad)
    partial = Partial(prefix, command_of(wanted), np.dtype(wanted.dtype))
    try:
        manifest = _work(partial, sources, job, encoder, num_workers, wanted, say)
    except OSError as error:
        raise MemparError(
            f"{error.filename or partial.directory} cannot be written or read ({error.strerror}); nothing is lost; see "
            "to it, and call the same command again to go on."
        ) from None
    finally:
        partial.close()
    say(f"{prefix}: {_summary(manifest)}")
    return manifest


def _work(
    partial: Partial,
    sources: list[Input],
    job: Job,
    encoder: Encoder,
    num_workers: int,
    wanted: DataManifest,
    say: Callable[[str], None],
) -> DataManifest:
    if partial.finished:
        partial.publish()
        found = read_manifest(partial.prefix)
        assert found is not None
        return found
    if partial.done.bad and not job.skip_bad:
        raise ConfigError(
            f"{partial.directory} has left out {partial.done.bad} bad documents; without --skip-bad there may be none; "
            "give --skip-bad again, or delete that directory."
        )
    if partial.done.tokens:
        say(f"going on after {partial.done.documents} documents and {partial.done.tokens} tokens")
    reasons = _encode(partial, sources, job, encoder, num_workers)
    done = partial.done
    for reason in reasons[:_NUM_REASONS]:
        say(f"left out: {reason}")
    if done.bad > _NUM_REASONS:
        say(f"left out: {done.bad} documents in all")
    if not done.tokens:
        raise ConfigError(
            f"there are no tokens in {len(sources)} files ({done.empty} empty documents, {done.bad} bad ones); a data "
            "set needs some text; name other files, or another --field."
        )
    return partial.finish(wanted)


def _encode(partial: Partial, sources: list[Input], job: Job, encoder: Encoder, num_workers: int) -> list[str]:
    """Encode and write what is left to do, behind a progress bar; return the first reasons of bad documents."""
    reasons: list[str] = []
    columns = (
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens, ends in"),
        TimeRemainingColumn(),
    )
    batches = reading.read_batches(sources, partial.done.after, unit=job.unit, field=job.field)
    with bars(*columns) as progress:
        total = sum(source.num_bytes for source in sources)
        task = progress.add_task("", total=total, completed=partial.done.num_bytes_read, documents=0, tokens=0)
        for batch, encoded in encode_all(batches, job, encoder, num_workers):
            partial.add(encoded, batch.after, batch.num_bytes_read)
            reasons += encoded.bad[: _NUM_REASONS - len(reasons)]
            done = partial.done
            progress.update(task, completed=done.num_bytes_read, documents=done.documents, tokens=done.tokens)
    return reasons


def _present(prefix: Path, wanted: DataManifest) -> DataManifest | None:
    """Return the manifest of a result that is there and is the one wanted; refuse any other file in its place."""
    there, directory = occupied(prefix), partial_directory(prefix)
    if not there or is_finished(directory):
        return None
    found = read_manifest(prefix)
    differing = ["nothing describes it"]
    if found is not None:
        now, before = ({**command_of(one), "versions": None} for one in (wanted, found))
        differing = [f"other {name}" for name in now if now[name] != before[name]]
        differing += [
            f"{prefix}.{suffix} has not the size it had"
            for suffix, file in (("bin", found.bin), ("idx", found.idx))
            if not os.path.exists(f"{prefix}.{suffix}") or os.path.getsize(f"{prefix}.{suffix}") != file.num_bytes
        ]
        if not differing:
            # All that an interruption at the very end has left.
            shutil.rmtree(directory, ignore_errors=True)
            return found
    raise ConfigError(
        f"{there[0]} exists and is not what this command makes ({', '.join(differing)}); nothing is overwritten; "
        "delete it, or choose another --out."
    )


def _summary(manifest: DataManifest) -> str:
    left_out = "".join(f", {count:,} {reason} left out" for reason, count in manifest.skipped.items() if count)
    return (
        f"{manifest.documents:,} documents{left_out}, {manifest.tokens:,} tokens of {manifest.tokenizer} (vocabulary "
        f"{manifest.vocab_size:,}, end of document {manifest.eod}), {manifest.dtype}"
    )
