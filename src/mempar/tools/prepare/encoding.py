"""Encoding: batches of text as tokens, in this process or in several, always in order."""

import functools
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from mempar.errors import ConfigError, MemparError
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.tokenizer import TokenizerSpec
from mempar.runtime.launch.parent import die_with
from mempar.tools.prepare.documents import Document, splitter
from mempar.tools.prepare.inputs import FORMATS
from mempar.tools.prepare.reading import Batch

# Batches read ahead of the one that is written, for each worker; bounds the memory.
_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker has to know.

    Attributes:
        spec: the tokenizer.
        unit: what a document of a text file is.
        field: key or column of the text.
        dtype: name of the dtype of tokens.
        skip_bad: leave bad documents out and count them.
    """

    spec: TokenizerSpec
    unit: str
    field: str
    dtype: str
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch's tokens.

    Attributes:
        tokens: `[tokens]`, ends of documents included.
        lengths: `[pieces] int64`, tokens of each document or piece of one.
        ends: `[pieces] bool`, False where the document goes on in the next batch.
        empty: documents without tokens, which are left out.
        bad: places and reasons of bad documents that were left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    empty: int
    bad: tuple[str, ...]


class BatchEncoder:
    """Encodes batches with one loaded tokenizer."""

    def __init__(self, job: Job, encoder: Encoder | None = None) -> None:
        self._job = job
        self._encoder = encoder or load_encoder(job.spec)
        self._split = {form: splitter(form, job.unit, job.field) for form in FORMATS}

    def encode(self, batch: Batch) -> Encoded:
        """Encode all documents of a batch.

        Raises:
            ConfigError: for the first bad document, unless they are to be skipped.
        """
        documents: list[Document] = []
        bad: list[str] = []
        for segment in batch.segments:
            for document in self._split[segment.form](segment):
                if not document.wrong:
                    documents.append(document)
                    continue
                place = f"{segment.path}, line {document.line}"
                self._refuse(place, document)
                bad.append(f"{place}: {document.wrong}")
        return encode_documents(documents, self._encoder, np.dtype(self._job.dtype), tuple(bad))

    def _refuse(self, place: str, document: Document) -> None:
        if not self._job.skip_bad:
            raise ConfigError(
                f"{place}: {document.wrong}; every document must be text in UTF-8; mend it, or leave such documents "
                "out with --skip-bad."
            )
        if not document.whole:
            raise ConfigError(
                f"{place}: {document.wrong}; --skip-bad leaves whole documents out, and this one is a long file whose "
                "beginning has been written; mend it, leave the file out, or choose other --documents."
            )


def encode_documents(
    documents: list[Document], encoder: Encoder, dtype: np.dtype, bad: tuple[str, ...] = ()
) -> Encoded:
    """Encode documents, none of which is bad, and close those that end.

    Args:
        documents: in order.
        encoder: the tokenizer.
        dtype: of the tokens.
        bad: places and reasons of those that were left out.
    """
    end = np.array([encoder.eod], dtype=dtype)
    parts, lengths, ends, empty = [], [], [], 0
    for document, ids in zip(documents, encoder.encode([one.text for one in documents]), strict=True):
        if document.whole and not len(ids):
            empty += 1
            continue
        parts.append(np.asarray(ids, dtype=dtype))
        if document.ends:
            parts.append(end)
        lengths.append(len(ids) + document.ends)
        ends.append(document.ends)
    return Encoded(
        tokens=np.concatenate(parts) if parts else end[:0],
        lengths=np.array(lengths, dtype=np.int64),
        ends=np.array(ends, dtype=np.bool_),
        empty=empty,
        bad=bad,
    )


def encode_all(
    batches: Iterator[Batch], job: Job, encoder: Encoder, num_workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches and yield them in their order, whatever the number of workers.

    Args:
        batches: read as they are needed, at most a few ahead for each worker.
        job: how to encode.
        encoder: the tokenizer as this process has loaded it.
        num_workers: processes that encode; 1 is this one.

    Raises:
        ConfigError: for the first bad document.
        MemparError: when a worker dies.
    """
    if num_workers == 1:
        here = BatchEncoder(job, encoder)
        for batch in batches:
            yield batch, here.encode(batch)
        return
    # Fresh processes: a fork would copy whatever threads the libraries have started.
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, job, batch)))
            if len(waiting) >= _AHEAD * num_workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool:
        raise MemparError(
            "a worker was killed, perhaps for want of memory; each holds a tokenizer and a few megabytes of text; "
            "use fewer --workers, and call the same command again to go on."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[Batch, Future[Encoded]]]) -> tuple[Batch, Encoded]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _start_worker() -> None:
    # A worker must not outlive the command.
    parent = multiprocessing.parent_process()
    die_with(parent.pid or 0 if parent is not None else 0)
    # The command's own process answers an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Loaded once in each worker.
_encoder = functools.cache(BatchEncoder)


def _encode(job: Job, batch: Batch) -> Encoded:
    return _encoder(job).encode(batch)
