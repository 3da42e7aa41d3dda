"""Wishes to stop: who has them, when time is up, and what signals do. Trained runs end in test_run_endings.py."""

import math
import os
import signal
import time

import pytest

from mempar.runtime.launch.stopping import REASONS, TIME_LIMIT, Stopping, Terminated, heed_signals, sigterm_raises


def settled(*wishes: list[float]) -> str:
    stopping = Stopping()
    stopping.settle([math.fsum(column) for column in zip(*wishes, strict=True)])
    return stopping.agreed


def test_wish_of_any_rank_is_everyones() -> None:
    quiet, asked = Stopping(), Stopping()
    assert settled(quiet.wishes(), quiet.wishes()) == ""
    asked.wish("SIGINT")
    assert settled(quiet.wishes(), asked.wishes()) == "SIGINT"
    both = [[1.0] * len(REASONS)] * 3
    assert settled(*both) == "SIGTERM"


def test_first_agreement_stays() -> None:
    stopping = Stopping()
    stopping.settle([0.0, 0.0, 2.0])
    stopping.settle([1.0, 0.0, 2.0])
    assert stopping.agreed == TIME_LIMIT


@pytest.mark.parametrize(
    ("minutes", "age_seconds", "reason"),
    [
        (0.0, 1e9, ""),
        # Five percent are kept free for a first save, here 6 s.
        (2.0, 110.0, ""),
        (2.0, 116.0, TIME_LIMIT),
        (600.0, 599 * 60.0 - 10 * 60.0, ""),
        (600.0, 591 * 60.0, TIME_LIMIT),
    ],
)
def test_time_limit_leaves_room_for_the_first_save(minutes: float, age_seconds: float, reason: str) -> None:
    stopping = Stopping()
    stopping.limit(time.time() - age_seconds, minutes)
    assert settled(stopping.wishes()) == reason


def test_time_limit_leaves_room_for_a_step_and_the_longest_save() -> None:
    stopping = Stopping()
    stopping.limit(time.time() - 59.5, 1.0)
    assert settled(stopping.wishes()) == TIME_LIMIT
    stopping = Stopping()
    with stopping.timed("save"):
        time.sleep(0.3)
    with stopping.timed("save"), stopping.timed("step"):
        time.sleep(0.1)
    stopping.limit(time.time() - 59.0, 1.0)
    assert settled(stopping.wishes()) == ""
    stopping.limit(time.time() - 59.7, 1.0)
    assert settled(stopping.wishes()) == TIME_LIMIT


def test_signals_are_wishes_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    wished: list[str] = []
    with heed_signals(wished.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert wished == ["SIGTERM", "SIGTERM", "SIGINT"]
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
