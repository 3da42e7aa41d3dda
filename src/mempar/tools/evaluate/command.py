"""`mempar eval` from its arguments to a table and a file.

What is wrong with the arguments is said before anything is fetched, and what is wrong with tasks and data before a
model is opened.
"""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from mempar.errors import ConfigError, MemparError
from mempar.runtime.checkpoint.accept import read_config
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.data import manifest as data_manifest
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.data.one_prefix import check_prefix
from mempar.runtime.durable import replace_file
from mempar.runtime.inference.checkpoint import find_checkpoint
from mempar.runtime.inference.opened import check_tables
from mempar.runtime.inference.shortage import explained_shortage
from mempar.runtime.inference.tokens import encoder_of, padded_vocab
from mempar.tools.bars import counting_bars
from mempar.tools.evaluate import report
from mempar.tools.evaluate.heldout import Loss, Stream, measure, open_tokens
from mempar.tools.evaluate.request import Request, Results
from mempar.tools.evaluate.rows import Row
from mempar.tools.evaluate.sizes import BatchSizes
from mempar.tools.evaluate.tasks import failed, find_tasks, harness, load_tasks, set_up
from mempar.tools.evaluate.work import score_rows
from mempar.tools.evaluate.workers import Map, open_workers

# Of metrics whose standard error has no closed form.
_BOOTSTRAPS = 1000


def evaluate(request: Request, say: Callable[[str], None]) -> Results:
    """Evaluate a checkpoint on tasks and data, and say what was found.

    Args:
        request: what is asked for.
        say: prints a line.

    Raises:
        ConfigError: for bad input.
        MemparError: when a worker dies, or the file cannot be written.
    """
    request.check()
    tables = check_tables(request.tables)
    checkpoint = find_checkpoint(request.checkpoint)
    manifest = read_manifest(checkpoint)
    results = Results(checkpoint=checkpoint, manifest=manifest, run=read_config(manifest))
    embeddings = padded_vocab(manifest)
    sizes = BatchSizes(given=request.batch_size, embeddings=embeddings)
    streams = _open_data(request, results, embeddings)
    loaded, encoder = _open_tasks(request, results)
    with open_workers(checkpoint, count=request.nproc, tables=tables) as spread:
        for stream in streams:
            results.losses.append(_loss(stream, request.samples, sizes, spread))
        # Tasks may take hours, and may fail.
        for line in report.loss_lines(results):
            say(line)
        if loaded is not None and encoder is not None:
            results.tasks = _run_tasks(loaded, encoder, request, results, sizes, spread)
    for line in report.task_lines(results):
        say(line)
    if request.out is not None:
        document = json.dumps(report.document(results, request), indent=1) + "\n"
        try:
            replace_file(request.out, document.encode())
        except OSError as error:
            raise MemparError(f"{request.out} cannot be written ({error.strerror}); results stand above.") from None
        say(f"results and settings: {request.out}")
    return results


def _open_data(request: Request, results: Results, embeddings: int) -> list[Stream]:
    """The data sets to be scored; bytes are counted where there is a tokenizer."""
    if not request.data:
        return []
    for prefix in request.data:
        check_prefix(prefix, "--data")
    made = {prefix: data_manifest.read_manifest(prefix) for prefix in request.data}
    encoder: Encoder | None = None
    try:
        encoder = encoder_of(results.manifest, results.run)
    except ConfigError as error:
        # Manifests say what ends a document; of other data only the tokenizer knows.
        if None in made.values():
            raise
        results.notes.append(f"bits a byte are not known: {error}")
    streams = []
    for prefix, about in made.items():
        eod = encoder.eod if encoder is not None else about.eod if about is not None else 0
        streams.append(
            Stream(
                data=prefix,
                tokens=open_tokens(prefix, results.run, embeddings),
                eod=eod,
                encoder=encoder,
                max_length=results.run.train.seq_length,
                embeddings=embeddings,
            )
        )
    return streams


def _loss(stream: Stream, samples: int | None, sizes: BatchSizes, spread: Map) -> Loss:
    """Measure the loss on one data set, behind a bar."""
    count = len(stream.starts(samples))
    with counting_bars() as begin:
        advance = begin(f"windows of {stream.data}", count)

        def score(batches: Iterator[list[Row]]) -> Iterator[list[float]]:
            for scores in spread(score_rows, batches):
                advance(len(scores))
                yield [likelihood for ((likelihood, _),) in scores]

        return measure(stream, samples=samples, batch_size=sizes.rows(stream.max_length), score=score)


def _open_tasks(request: Request, results: Results) -> tuple[dict[str, Any] | None, Encoder | None]:
    """The tasks as the harness has loaded them, and the tokenizer."""
    if not request.tasks:
        return None, None
    encoder = encoder_of(results.manifest, results.run)
    manager, results.asked = find_tasks(request.tasks, request.task_dir)
    loaded = load_tasks(manager, results.asked, allow_code=request.allow_code)
    results.notes += set_up(loaded["tasks"], num_fewshot=request.num_fewshot, seed=request.seed)
    return loaded, encoder


def _run_tasks(
    loaded: dict[str, Any], encoder: Encoder, request: Request, results: Results, sizes: BatchSizes, spread: Map
) -> dict[str, Any]:
    """Let the harness ask its questions, and make metrics of the answers."""
    # Imports the harness, which is not there for everybody.
    from mempar.tools.evaluate.harness_model import HarnessModel

    model = HarnessModel(spread, encoder, max_length=results.run.train.seq_length, sizes=sizes, seed=request.seed)
    # As the harness's own command does.
    random.seed(0)
    np.random.seed(request.seed)
    torch.manual_seed(request.seed)
    try:
        with explained_shortage(str(results.checkpoint)):
            found = harness("evaluator").evaluate(
                lm=model,
                task_dict=loaded,
                limit=request.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                confirm_run_unsafe_code=request.allow_code,
            )
    except (MemparError, BrokenProcessPool):
        raise
    except Exception as error:
        # Functions of tasks are code from elsewhere: whatever they raise.
        raise failed(error, loaded["tasks"], results.asked) from error
    results.notes += model.notes
    return found
