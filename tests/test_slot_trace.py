"""Tests of `mempar.runtime.slot_trace`: parts of sequences from many ranks become one trace."""

import pickle

import numpy as np
import pytest
import torch

from mempar.runtime.data.samples import Batch
from mempar.runtime.in_flight import Pass
from mempar.runtime.slot_trace import SlotTrace, SlotTracer

SAMPLES, LENGTH, HEADS, TOP_K = [7, 3], 6, 2, 3


def random_slots(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1000, shape)


def a_pass(samples: list[int], *, again: bool = False) -> Pass:
    none = torch.zeros(0)
    batch = Batch(
        tokens=none, labels=none, loss_mask=none, position_ids=none, sample_ids=samples, sample_counts=[len(samples)]
    )
    return Pass(batch=batch, again=again)


def traced(chosen: torch.Tensor, *, shards: int, step: int = 0) -> list[SlotTrace]:
    """What each of the ranks that share a sequence records; `chosen` is [positions, samples, H, K]."""
    traces = []
    for shard, part in enumerate(chosen.chunk(shards)):
        tracer = SlotTracer(shard=shard, num_shards=shards)
        tracer.step = step
        hook = tracer(5, len(part), a_pass(SAMPLES))
        assert hook(None) is None
        flat = part.flatten(0, 1)
        assert hook(flat) is flat
        traces.append(tracer.recorded)
    return traces


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_parts_of_sequences_join(shards: int) -> None:
    chosen = random_slots(LENGTH, len(SAMPLES), HEADS, TOP_K)
    trace = SlotTrace()
    parts = traced(chosen, shards=shards, step=4)
    for part in reversed(parts):
        trace.merge(pickle.loads(pickle.dumps(part)))
    assert (parts[0].unrecorded() == []) == (shards == 1)
    assert trace.unrecorded() == []
    assert len(trace) == len(SAMPLES)
    for place, sample in enumerate(SAMPLES):
        np.testing.assert_array_equal(trace.slots[4, 5, sample], chosen[:, place].numpy())


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_replay_gives_each_rank_its_positions(shards: int) -> None:
    chosen = random_slots(LENGTH, len(SAMPLES), HEADS, TOP_K)
    (trace,) = traced(chosen, shards=1)
    for shard, part in enumerate(chosen.chunk(shards)):
        # Samples arrive in another order than they were recorded in.
        tracer = SlotTracer(shard=shard, num_shards=shards, replay=trace)
        replayed = tracer(5, len(part), a_pass(SAMPLES[::-1]))(None)
        assert replayed is not None and replayed.dtype == torch.int64
        assert torch.equal(replayed, part.flip(1).flatten(0, 1))


def test_disagreement_is_refused() -> None:
    chosen = random_slots(LENGTH, len(SAMPLES), HEADS, TOP_K)
    (one,), (other,) = traced(chosen, shards=1), traced(chosen + 1, shards=1)
    with pytest.raises(ValueError, match="different slots"):
        one.merge(other)
    with pytest.raises(ValueError, match="different slots"):
        one.record((0, 5, 7), chosen[:2, 0].numpy() + 1, 0, LENGTH)
    (shorter,) = traced(chosen[:3], shards=1)
    with pytest.raises(ValueError, match="in one trace"):
        one.merge(shorter)


def test_what_was_not_recorded_cannot_be_replayed() -> None:
    chosen = random_slots(LENGTH, len(SAMPLES), HEADS, TOP_K)
    half = traced(chosen, shards=2)[0]
    tracer = SlotTracer(replay=half)
    with pytest.raises(ValueError, match="lacks positions"):
        tracer(5, LENGTH, a_pass(SAMPLES))(None)
    with pytest.raises(ValueError, match="not in the trace"):
        tracer(6, LENGTH, a_pass(SAMPLES))(None)


def test_repeated_pass_must_choose_alike() -> None:
    chosen = random_slots(LENGTH * len(SAMPLES), HEADS, TOP_K)
    tracer = SlotTracer()
    tracer(5, LENGTH, a_pass(SAMPLES))(chosen)
    tracer(5, LENGTH, a_pass(SAMPLES, again=True))(chosen)
    with pytest.raises(ValueError, match="two passes"):
        tracer(5, LENGTH, a_pass(SAMPLES, again=True))(chosen + 1)


def test_nothing_is_read_from_a_micro_batch_of_padding() -> None:
    tracer = SlotTracer(replay=SlotTrace())
    hook = tracer(5, LENGTH, a_pass([]))
    assert hook(None) is None
    hook(random_slots(0, HEADS, TOP_K))
    assert len(tracer.recorded) == 0
