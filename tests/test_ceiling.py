"""mempar.runtime.profile.ceiling: what is measured over real groups, and at which sizes."""

import math

import pytest
import torch
import torch.distributed as dist

from mempar.runtime.profile.ceiling import LARGEST_BYTES, SMALLEST_BYTES, Ceiling, measure_ceiling, message_sizes
from rank_pool import RankPool


@pytest.mark.parametrize(("largest", "ranks"), [(0, 2), (1, 2), (40_000, 4), (5_000_001, 3), (1 << 28, 8), (4096, 7)])
def test_message_sizes_grow_to_the_largest(largest: int, ranks: int) -> None:
    sizes = message_sizes(largest, ranks)
    assert sizes == sorted(set(sizes)) and len(sizes) >= 2
    share = 4 * (ranks - 1)
    assert all(size % share == 0 for size in sizes)
    assert SMALLEST_BYTES <= sizes[0] < SMALLEST_BYTES + share
    assert max(largest, 8 * SMALLEST_BYTES) <= sizes[-1] < max(largest, 8 * SMALLEST_BYTES) + share


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_message_sizes_end_where_larger_ones_tell_nothing_new(ranks: int) -> None:
    # Gradients of 8e9 parameters in one buffer.
    sizes = message_sizes(32 * 10**9, ranks)
    assert LARGEST_BYTES <= sizes[-1] < LARGEST_BYTES + 4 * ranks
    assert sizes == message_sizes(LARGEST_BYTES, ranks)


def measured(largest: list[int]) -> list[Ceiling]:
    """Ranks 0 and 1 exchange memories' rows, rank 2 has none; all three are data-parallel, in a pipeline of three."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    groups = {"mp": pair if rank < 2 else None, "tp": None, "pp": dist.group.WORLD, "dp": dist.group.WORLD}
    return measure_ceiling(groups, {"mp": largest[rank], "dp": 1}, torch.device("cpu"), rounds=3)


def test_ceiling_of_every_kind_of_group_is_the_same_on_all_ranks(pool: RankPool) -> None:
    found, second, third = pool.run(3, measured, [70_000, 300_000, 0])
    assert found == second == third
    kinds = {(one.group, one.collective): one.ranks for one in found}
    both = ("all_to_all", "all_reduce")
    assert kinds == {
        **{("mp", collective): 2 for collective in both},
        **{(group, collective): 3 for group in ("pp", "dp") for collective in both},
        ("pp", "send"): 3,
    }
    for group, collective in kinds:
        rows = [one for one in found if (one.group, one.collective) == (group, collective)]
        assert [one.message_bytes for one in rows] == message_sizes(300_000 if group == "mp" else 1, rows[0].ranks)
        for one in rows:
            assert 0 < one.microseconds < 1e6 and one.latency_us == rows[0].microseconds
            left = one.message_bytes * (2 * (one.ranks - 1) / one.ranks if collective == "all_reduce" else 1)
            assert math.isclose(one.gb_per_s, left / one.microseconds / 1e3)


def test_ceiling_of_one_rank_is_empty(pool: RankPool) -> None:
    assert pool.run(1, alone) == [[]]


def alone() -> list[Ceiling]:
    return measure_ceiling({"mp": None, "dp": dist.group.WORLD}, {"mp": 10}, torch.device("cpu"))
