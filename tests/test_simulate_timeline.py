"""The event engine: exact times of pipelines, collectives and messages, its laws, and the critical path."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempar.tools.simulate.critical_path import critical_path, path_words
from mempar.tools.simulate.pipeline import walk
from mempar.tools.simulate.schedule import Pass
from mempar.tools.simulate.timeline import BUBBLE, COMPUTE, EXPOSED, KINDS, OVERLAPPED, WAITING, Members, Timeline


def piped(
    pp: int,
    vpp: int,
    count: int,
    *,
    forward: int = 3_000,
    backward: int = 7_000,
    message: int = 0,
    width: int = 1,
    jitter: np.ndarray | None = None,
    watched: tuple[int, ...] = (),
) -> Timeline:
    """A pipeline whose chunks take equally long; `jitter [stages, width]` is added to every pass of a rank."""
    timeline = Timeline(pp, width, watched)

    def compute(stage: int, step: Pass) -> None:
        extra = 0 if jitter is None else jitter[stage]
        timeline.compute(
            stage, "forward" if step.is_forward else "backward", extra + (forward if step.is_forward else backward)
        )

    walk(timeline, vpp=vpp, num_micro_batches=count, compute=compute, message_ps=lambda source, target: message)
    return timeline


@pytest.mark.parametrize(("pp", "count"), [(1, 5), (2, 1), (2, 8), (3, 7), (4, 4), (8, 32), (16, 3)])
@pytest.mark.parametrize(("forward", "backward"), [(5, 5), (3, 7), (1_000_003, 1_999_993)])
def test_pipeline_without_links_takes_its_slots(pp: int, count: int, forward: int, backward: int):
    timeline = piped(pp, 1, count, forward=forward, backward=backward)
    slot = forward + backward
    assert timeline.end == (count + pp - 1) * slot
    (busy, waited) = (timeline.spent(kind) for kind in (COMPUTE, BUBBLE))
    assert (busy["forward"] + busy["backward"] == count * slot).all()
    if pp > 1:
        # The first stage waits for nothing but the pipeline to fill and to drain.
        assert waited["send/pp"][0, 0] == (pp - 1) * slot


@pytest.mark.parametrize(("pp", "vpp", "rounds"), [(2, 2, 1), (2, 2, 4), (2, 5, 3), (4, 2, 1), (4, 3, 3), (8, 4, 2)])
def test_interleaved_pipeline_without_links_shortens_the_bubble(pp: int, vpp: int, rounds: int):
    forward, backward, count = 40, 40, rounds * pp
    timeline = piped(pp, vpp, count, forward=forward, backward=backward)
    assert timeline.end == (count * vpp + pp - 1) * (forward + backward)


def test_ranks_side_by_side_do_not_disturb_each_other():
    slow = np.array([[0, 500], [0, 0], [0, 0]])
    both, alone = (piped(3, 1, 6, width=2, jitter=j) for j in (slow, np.zeros((3, 2), dtype=np.int64)))
    assert both.clocks[0][0] == alone.clocks[0][0] and both.clocks[0][1] > alone.clocks[0][1]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(2, 1, 5), (4, 1, 3), (4, 1, 9), (2, 2, 4), (4, 2, 8), (3, 3, 3)]),
    forward=st.integers(0, 10**6),
    backward=st.integers(0, 10**6),
    message=st.integers(0, 10**6),
    shorter=st.integers(0, 10**6),
    seed=st.integers(0, 2**16),
)
def test_shorter_messages_never_slow(
    shape: tuple[int, int, int], forward: int, backward: int, message: int, shorter: int, seed: int
):
    jitter = np.random.default_rng(seed).integers(0, 10**5, (shape[0], 3))
    short, long = sorted((message, shorter))
    ends = [
        piped(*shape, forward=forward, backward=backward, message=ps, width=3, jitter=jitter).clocks
        for ps in (short, long)
    ]
    assert all((fast <= slow).all() for fast, slow in zip(*ends, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 5), (4, 1, 9), (4, 2, 8), (3, 3, 3)])
def test_time_of_each_rank_is_accounted_for(shape: tuple[int, int, int]):
    jitter = np.random.default_rng(5).integers(0, 2_000, (shape[0], 4))
    timeline = piped(*shape, message=900, width=4, jitter=jitter, watched=(0, 2))
    everyone = tuple(range(shape[0]))
    timeline.collective(everyone, "all_reduce/world", Members(outer=1, size=4), 100)
    total = sum(sum(timeline.spent(kind).values()) for kind in KINDS if kind != OVERLAPPED)
    assert (total == timeline.end).all()
    for rank in (0, 2):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert sum(span.end - span.start for span in spans) == timeline.end
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))


def test_interleaved_messages_hide_behind_passes():
    plain, interleaved = (piped(4, vpp, 8, message=500) for vpp in (1, 2))
    assert not plain.spent(OVERLAPPED)
    assert interleaved.spent(OVERLAPPED)["send/pp"].sum() > 0


@pytest.mark.parametrize(
    ("members", "groups"),
    [
        (Members(outer=3, size=2), [(0, 1), (2, 3), (4, 5)]),
        (Members(outer=1, size=3, inner=2), [(0, 2, 4), (1, 3, 5)]),
        (Members(outer=6, size=1), [(rank,) for rank in range(6)]),
    ],
)
def test_collective_begins_with_its_last_member(members: Members, groups: list[tuple[int, ...]]):
    timeline = Timeline(1, 6)
    arrivals = np.array([5, 40, 30, 20, 60, 10])
    timeline.compute(0, "work", arrivals)
    timeline.collective((0,), "all_reduce/tp", members, 7)
    for group in groups:
        assert all(timeline.clocks[0][rank] == max(arrivals[list(group)]) + 7 for rank in group)
    waited = timeline.spent(WAITING).get("all_reduce/tp", np.zeros((1, 6), dtype=np.int64))
    assert (waited[0] == timeline.clocks[0] - 7 - arrivals).all()
    assert (timeline.spent(EXPOSED)["all_reduce/tp"] == 7).all()
    assert sum(segment.picoseconds for segment in critical_path(timeline)) == timeline.end
    assert next(segment.rank for segment in critical_path(timeline)) == 4


def test_collective_joins_groups_of_several_stages():
    timeline = Timeline(3, 4)
    for stage, late in enumerate([(1, 2, 3, 4), (0, 0, 0, 0), (9, 0, 0, 6)]):
        timeline.compute(stage, "work", np.array(late))
    timeline.collective((0, 2), "copy_sync", Members(outer=1, size=2, inner=2), 10)
    assert timeline.clocks[0].tolist() == timeline.clocks[2].tolist() == [19, 16, 19, 16]
    assert timeline.clocks[1].tolist() == [0, 0, 0, 0]
    assert [(segment.stage, segment.rank) for segment in critical_path(timeline)] == [(2, 0), (0, 0)]


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 5), (4, 1, 9), (4, 2, 8), (3, 3, 3)])
def test_critical_path_adds_up_to_the_step(shape: tuple[int, int, int]):
    jitter = np.random.default_rng(7).integers(0, 4_000, (shape[0], 5))
    timeline = piped(*shape, message=1_100, width=5, jitter=jitter)
    path = critical_path(timeline)
    assert sum(segment.picoseconds for segment in path) == timeline.end
    words = path_words(path)
    assert "computes" in words and "backward" in words
    assert ("send/pp" in words) == (shape[0] > 1)


def test_critical_path_goes_through_the_slow_rank():
    slow = np.zeros((2, 8), dtype=np.int64)
    slow[1, 6] = 50_000
    path = critical_path(piped(2, 1, 6, width=8, jitter=slow))
    assert {segment.rank for segment in path} == {6}
