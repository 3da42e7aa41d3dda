"""Ending a run early on purpose: by a signal, or by its time limit.

A rank that is asked to stop says so in the reduction that every step makes anyway (see optim.py), and in that of every
held-out batch. All ranks thus learn of it in the same step, finish that, save and leave, whichever of them was asked.
A second SIGTERM changes nothing; a second SIGINT ends the process at once. Nothing here imports torch.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TIME_LIMIT = "its time limit"
# Each is a number in the reduction: how many ranks ask for it.
REASONS = ("SIGTERM", "SIGINT", TIME_LIMIT)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What is kept free for the first save, whose length is not known: a share of the limit, and seconds at the most.
_FIRST_SAVE_SHARE = 0.05
_FIRST_SAVE_MOST_SECONDS = 600.0


class Stopping:
    """Whether a run is to end before its last step.

    Attributes:
        agreed: the reason, equal on all ranks; empty while the run goes on.
    """

    def __init__(self) -> None:
        self.agreed = ""
        self._wished: set[str] = set()
        self._deadline, self._first_save_seconds = math.inf, 0.0
        self._longest_seconds: dict[str, float] = {}

    def limit(self, launched: float, minutes: float) -> None:
        """Set the time limit.

        Args:
            launched: seconds since the epoch from which it counts.
            minutes: the limit; 0 is none.
        """
        if minutes:
            self._deadline = launched + minutes * 60.0
            self._first_save_seconds = min(_FIRST_SAVE_SHARE * minutes * 60.0, _FIRST_SAVE_MOST_SECONDS)

    def wish(self, reason: str) -> None:
        """Ask all ranks to stop when they next agree."""
        self._wished.add(reason)

    def wishes(self) -> list[float]:
        """This rank's part of the sums over the world that `settle` takes, one number for each of `REASONS`."""
        longest = {"save": self._first_save_seconds, **self._longest_seconds}
        if time.time() + sum(longest.values()) > self._deadline:
            self.wish(TIME_LIMIT)
        return [float(reason in self._wished) for reason in REASONS]

    def settle(self, sums: list[float]) -> None:
        """Take over what all ranks wish, as summed over the world."""
        wished = [reason for reason, ranks in zip(REASONS, sums, strict=True) if ranks]
        if wished and not self.agreed:
            self.agreed = wished[0]

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Measure something (`step`, `save`, `evaluation`) that has to fit in before the time limit."""
        started = time.monotonic()
        yield
        self.took(kind, time.monotonic() - started)

    def took(self, kind: str, seconds: float) -> None:
        """Note how long something took that has to fit in before the time limit."""
        self._longest_seconds[kind] = max(seconds, self._longest_seconds.get(kind, 0.0))


class Terminated(BaseException):
    """SIGTERM came where there is nothing to finish; not an `Exception`, so that nothing else takes it for its own."""


@contextmanager
def heed_signals(wish: Callable[[str], None], again: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into wishes to stop; must be called in the main thread.

    Afterwards they do what they did before, unless something else was set meanwhile (`ignore_signals`).

    Args:
        wish: called with the signal's name, in the main thread between any two instructions.
        again: called at a second SIGINT; raises KeyboardInterrupt unless given.
    """
    interrupted = False

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            if again is None:
                raise KeyboardInterrupt
            again()
        interrupted = interrupted or number == signal.SIGINT
        wish(signal.Signals(number).name)

    with _handlers(dict.fromkeys(_SIGNALS, heed)):
        yield


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`; must be called in the main thread."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handlers({signal.SIGTERM: leave}):
        yield


@contextmanager
def _handlers(wanted: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is wanted[number]:
                # None stands for a handler that was not made in Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_signals() -> None:
    """Let SIGTERM and SIGINT do nothing from now on: a process that leaves anyway keeps its exit status."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
