"""Tests of `mempar.runtime.slot_trace`: parts of sequences from many ranks become one trace."""

import pickle

import numpy as np
import pytest
import torch

from mempar.runtime.slot_trace import SlotTrace, SlotTracer

SAMPLES, LENGTH, HEADS, TOP_K = [7, 3], 6, 2, 3


def random_slots(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1000, shape)


def traced(chosen: torch.Tensor, *, shards: int, step: int = 0) -> list[SlotTrace]:
    """What each of the ranks that share a sequence records; `chosen` is [positions, samples, H, K]."""
    traces = []
    for shard, part in enumerate(chosen.chunk(shards)):
        tracer = SlotTracer(lambda: SAMPLES, shard=shard, num_shards=shards)
        tracer.step = step
        hook = tracer(5, len(part), len(SAMPLES))
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
        tracer = SlotTracer(lambda: SAMPLES[::-1], shard=shard, num_shards=shards, replay=trace)
        replayed = tracer(5, len(part), len(SAMPLES))(None)
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
    tracer = SlotTracer(lambda: SAMPLES, replay=half)
    with pytest.raises(ValueError, match="lacks positions"):
        tracer(5, LENGTH, len(SAMPLES))(None)
    with pytest.raises(ValueError, match="not in the trace"):
        tracer(6, LENGTH, len(SAMPLES))(None)
    with pytest.raises(ValueError, match="names 2"):
        tracer(5, LENGTH, 1)
