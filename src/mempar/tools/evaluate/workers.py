"""Opened models in this process, or in several at once, each with one of its own.

Work is dealt out batch by batch to whoever is free, and results come back in the order of the batches; which batches
there are does not depend on the number of workers, so neither do results. Tables that are mapped are in memory once,
for all workers. Worker i computes on GPU i, or with its share of the cores.
"""

import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import util
from pathlib import Path
from typing import Any, TypeVar

import torch

from mempar.errors import MemparError
from mempar.runtime.inference.opened import OpenedModel, Tables, open_model
from mempar.runtime.inference.shortage import explained_shortage
from mempar.runtime.launch.parent import die_with

Batch = TypeVar("Batch")
Result = TypeVar("Result")
# Batches made ahead of the one whose result is next, for each worker; bounds the memory.
_AHEAD = 4
# Calls a function with an opened model and each of some batches, and yields the results in order.
Map = Callable[[Callable[[OpenedModel, Batch], Result], Iterable[Batch]], Iterator[Result]]


@contextmanager
def open_workers(checkpoint: Path, *, count: int, tables: Tables) -> Iterator[Map]:
    """Open a checkpoint in this process, or in `count` others.

    Args:
        checkpoint: see `open_model`.
        count: of workers; 1 is this process.
        tables: see `open_model`; `auto` maps those of several workers that have no GPUs of their own.

    Yields:
        What deals out work. What it calls must be a function of a module.

    Raises:
        MemparError: when a worker dies, or memory does not suffice.
    """
    if count == 1:
        with open_model(checkpoint, tables=tables) as opened:
            yield lambda work, batches: (_computed(work, opened, batch) for batch in batches)
        return
    if tables == "auto" and not torch.cuda.is_available():
        # In the memory that they share.
        tables = "mapped"
    # A fork would copy threads, and what they hold.
    context = multiprocessing.get_context("spawn")
    arguments = (os.getpid(), context.Value("i", 0), count)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=arguments)
    try:
        yield functools.partial(_deal_out, pool, _AHEAD * count, functools.partial(_work, checkpoint, tables))
    except BrokenProcessPool:
        raise MemparError(
            f"one of {count} workers was killed, perhaps for want of memory: each holds the dense part of the model, "
            "and tables that are not mapped; use fewer --nproc, or --tables mapped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _deal_out(
    pool: ProcessPoolExecutor,
    most: int,
    call: Callable[..., Any],
    work: Callable[..., Any],
    batches: Iterable[Any],
) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for batch in batches:
        waiting.append(pool.submit(call, work, batch))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start(parent: int, numbers: Any, count: int) -> None:
    """Make a process a worker: the first thing it does."""
    die_with(parent)
    # An interrupt ends it without a word: the command's own process answers.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    # What tells a rank its GPU and its share of the cores.
    os.environ.update(LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(count), TOKENIZERS_PARALLELISM="false")


@functools.cache
def _opened(checkpoint: Path, tables: Tables) -> OpenedModel:
    """This worker's model, opened once."""
    stack = ExitStack()
    util.Finalize(None, stack.close, exitpriority=1)
    return stack.enter_context(open_model(checkpoint, tables=tables))


def _work(checkpoint: Path, tables: Tables, work: Callable[..., Any], batch: Any) -> Any:
    return _computed(work, _opened(checkpoint, tables), batch)


def _computed(work: Callable[..., Any], opened: OpenedModel, batch: Any) -> Any:
    # In another process nothing else does: what opens the model there is long past.
    with explained_shortage(str(opened.checkpoint)):
        return work(opened, batch)
