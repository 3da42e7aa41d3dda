"""Tests of `mempar.runtime.data.batch_plan`: every sample once, equally many micro-batches, padding at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempar.runtime.data.batch_plan import BatchPlan, plan_batch
from toy import toy_run


@given(
    num_samples=st.integers(1, 60),
    micro_batch_size=st.integers(1, 5),
    dp=st.integers(1, 7),
    multiple=st.integers(1, 5),
)
def test_every_sample_is_dealt_once_and_in_order(
    num_samples: int, micro_batch_size: int, dp: int, multiple: int
) -> None:
    plan = BatchPlan(num_samples=num_samples, micro_batch_size=micro_batch_size, dp=dp, multiple=multiple)
    dealt = [plan.samples_of(j, rank) for j in range(plan.num_micro_batches) for rank in range(dp)]
    assert [sample for part in dealt for sample in part] == list(range(num_samples))
    assert all(len(part) <= micro_batch_size for part in dealt)
    assert [len(part) for part in dealt] == [count for j in range(plan.num_micro_batches) for count in plan.counts(j)]
    assert plan.num_micro_batches % multiple == 0
    assert plan.num_padding == len(dealt) * micro_batch_size - num_samples
    # No round of micro-batches more than the schedule needs.
    assert plan.num_padding < dp * micro_batch_size * multiple


@pytest.mark.parametrize(
    ("layout", "dp", "micro_batches", "padding"),
    [
        ({}, 1, 5, 0),
        ({}, 2, 3, 1),
        ({}, 4, 2, 3),
        ({"pp": 2}, 1, 5, 0),
        ({"pp": 2, "vpp": 2}, 1, 6, 1),
        ({"pp": 2, "vpp": 2}, 2, 4, 3),
    ],
)
def test_interleaved_stages_take_multiples_of_the_pipeline(
    layout: dict[str, int], dp: int, micro_batches: int, padding: int
) -> None:
    plan = plan_batch(toy_run(ragged=True, global_batch_size=5, **layout), dp)
    assert (plan.num_micro_batches, plan.num_padding) == (micro_batches, padding)
    assert plan_batch(toy_run(ragged=True, global_batch_size=5, **layout), dp, 2).num_samples == 2
