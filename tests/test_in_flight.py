"""Tests of `mempar.runtime.in_flight`: each pass knows its micro-batch, the repeated one too."""

import pytest
import torch

from mempar.runtime.data.samples import Batch
from mempar.runtime.in_flight import InFlight


def batches(number: int) -> list[Batch]:
    none = torch.zeros(0)
    return [
        Batch(tokens=none, labels=none, loss_mask=none, position_ids=none, sample_ids=[i], sample_counts=[1])
        for i in range(number)
    ]


def test_repeated_passes_come_in_the_order_of_the_first_ones() -> None:
    flight, (first, second, third) = InFlight(runs_again=True), batches(3)

    def compute(batch: Batch, block: int) -> None:
        flight.current = batch
        with torch.no_grad():
            entered = flight.enter(block, training=True)
        assert (entered.batch, entered.again) == (batch, False)

    def differentiate(batch: Batch, block: int) -> None:
        repeated = flight.enter(block, training=True)
        assert (repeated.batch, repeated.again) == (batch, True)

    # One forward, one backward, with two micro-batches under way; the blocks of two chunks apart.
    compute(first, 1)
    compute(second, 1)
    compute(first, 3)
    differentiate(first, 1)
    compute(third, 1)
    differentiate(second, 1)
    differentiate(first, 3)
    with pytest.raises(AssertionError, match=r"\{1: 1\}"):
        flight.finish()
    differentiate(third, 1)
    flight.finish()
    assert flight.current is None


def test_passes_that_are_not_repeated_leave_no_note() -> None:
    flight, (batch,) = InFlight(runs_again=False), batches(1)
    flight.current = batch
    assert not flight.enter(1, training=True).again
    again = InFlight(runs_again=True)
    again.current = batch
    with torch.no_grad():
        assert not again.enter(1, training=False).again
    for each in (flight, again):
        each.finish()
