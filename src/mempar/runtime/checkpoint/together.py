"""What all ranks do together around long work of their own: wait without a deadline, fail with one message.

Collectives have a deadline (`train.collective_timeout`) against ranks that hang; a rank that writes for
longer than another one does not hang. So ranks that are done keep meeting in tiny collectives until all are.
"""

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mempar.errors import MemparError
from mempar.runtime.bringup import World

# Between two meetings ranks sleep for a share of the time that they have waited, so that little is lost in the end.
_PAUSE_SHARE, _LEAST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.03, 0.001, 1.0


def wait_for_all(world: World, is_done: Callable[[], bool]) -> None:
    """Wait until something is done on every rank, for as long as it takes; every rank must call it."""
    started = time.monotonic()
    while True:
        done = torch.tensor(float(is_done()), device=world.device)
        dist.all_reduce(done)
        if int(done) == world.size:
            return
        waited = time.monotonic() - started
        time.sleep(min(max(_PAUSE_SHARE * waited, _LEAST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS))


def do_together(world: World, work: Callable[[], None]) -> None:
    """Let every rank do work without collectives, for as long as it takes; every rank must call it.

    Raises:
        MemparError: on every rank, what the first rank that failed had to say.
    """
    failure: list[Exception] = []

    def try_work() -> None:
        try:
            work()
        # Whatever it is, the other ranks wait to hear of it.
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=try_work, name="checkpoint")
    thread.start()
    wait_for_all(world, lambda: not thread.is_alive())
    raise_together(world, failure[0] if failure else None)


def raise_together(world: World, error: Exception | None) -> None:
    """Raise the first rank's error on all of them, if any has one; every rank must call it."""
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, error and as_told(world, error))
    first = next((found for found in told if found is not None), None)
    if first is not None:
        raise first if error is None or isinstance(error, MemparError) else error


def on_main(world: World, mine: Any, act: Callable[[list[Any]], Any]) -> Any:
    """Let the main rank act on what all ranks have to say; every rank must call it, and gets its result.

    Raises:
        MemparError: on every rank, when the main rank failed.
    """
    said: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(mine, said)
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if said is not None:
        try:
            outcome[0] = act(said)
        except Exception as error:
            failure, outcome[1] = error, as_told(world, error)
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def as_told(world: World, error: Exception) -> MemparError:
    """An error as other ranks hear of it; what is no explained failure is shown where it happened."""
    if isinstance(error, MemparError):
        return error
    traceback.print_exception(error)
    return MemparError(
        f"rank {world.rank} failed with {type(error).__name__}: {error}; the others cannot go on without it; see its "
        "traceback in the output."
    )
