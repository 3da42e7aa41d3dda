"""Rank arithmetic of the memory dimension."""

import itertools
import random

import pytest

from mempar.errors import ConfigError
from mempar.parallel.ranks import RankGrid


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def random_grid(rng: random.Random) -> tuple[RankGrid, tuple[int, ...]]:
    """A grid, and stages that hold a table."""
    tp, cp, pp, dp = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
    mp = rng.choice(divisors(tp * cp * dp))
    stages = tuple(sorted(rng.sample(range(pp), rng.randint(1, pp))))
    mp_rows = rng.choice(divisors(mp))
    return RankGrid(world=tp * cp * pp * dp, tp=tp, cp=cp, pp=pp, mp=mp, mp_rows=mp_rows), stages


def test_rank_grid_numbers_ranks_as_megatron_does(rng: random.Random) -> None:
    for grid, _ in (random_grid(rng) for _ in range(50)):
        places = itertools.product(range(grid.pp), range(grid.dp), range(grid.cp), range(grid.tp))
        for rank, (stage, dp_rank, _, tp_rank) in enumerate(places):
            assert (grid.stage_of(rank), grid.dp_rank(rank), grid.tp_rank(rank)) == (stage, dp_rank, tp_rank)
        assert rank == grid.world - 1
        assert grid.mp_columns * grid.mp_rows == grid.mp


def test_memory_groups_are_disjoint_and_cover_the_stages_of_the_table(rng: random.Random) -> None:
    for grid, stages in (random_grid(rng) for _ in range(100)):
        groups = grid.memory_groups(stages)
        ranks = [rank for group in groups for rank in group]
        assert sorted(ranks) == [rank for rank in range(grid.world) if grid.stage_of(rank) in stages]
        for group in groups:
            assert len({grid.stage_of(rank) for rank in group}) == 1
            assert [grid.memory_rank(rank) for rank in group] == list(range(grid.mp))


def test_copy_groups_hold_equal_shards_and_cover_all_memory_groups(rng: random.Random) -> None:
    for grid, stages in (random_grid(rng) for _ in range(100)):
        groups, copies = grid.memory_groups(stages), grid.copy_groups(stages)
        assert [{grid.memory_rank(rank) for rank in ranks} for ranks in copies] == [{s} for s in range(grid.mp)]
        assert sorted(rank for ranks in copies for rank in ranks) == sorted(rank for group in groups for rank in group)
        for ranks, group in itertools.product(copies, groups):
            assert len(set(ranks) & set(group)) == 1


def test_hop_groups_are_the_column_and_row_shards_of_each_memory_group() -> None:
    grid = RankGrid(world=24, pp=2, mp=6, mp_rows=3, mp_hops=2)
    assert grid.inside_groups((1,)) == [[12, 13, 14], [15, 16, 17], [18, 19, 20], [21, 22, 23]]
    assert grid.across_groups((1,)) == [[12, 15], [13, 16], [14, 17], [18, 21], [19, 22], [20, 23]]
    one_hop = RankGrid(world=24, pp=2, mp=6, mp_rows=3)
    assert one_hop.inside_groups((1,)) == one_hop.across_groups((1,)) == []


def test_rank_grid_has_no_groups_without_a_table() -> None:
    grid = RankGrid(world=8, tp=2, pp=2)
    assert grid.memory_groups(()) == grid.copy_groups(()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 6, "tp": 2, "pp": 2}, r"6 ranks .*tp=2 x cp=1 x pp=2 = 4"),
        ({"world": 4, "tp": 8}, r"4 ranks .*tp=8 "),
        ({"world": 8, "tp": 2, "pp": 2, "mp": 3}, r"parallel\.mp=3 .*2\*1\*2 = 4 on 8 ranks.*parallel\.mp=1, 2, 4,"),
        ({"world": 2, "mp": 4}, r"parallel\.mp=4 .* = 2 on 2 ranks"),
        ({"world": 6, "mp": 6, "mp_rows": 4}, r"parallel\.mp_rows=4 .*parallel\.mp=6"),
        ({"world": 4, "mp": 4, "mp_rows": 4, "mp_hops": 2}, r"mp_hops=2 with 4 row x 1 column .*divisor of .*=4 "),
        ({"world": 4, "mp": 4, "mp_rows": 1, "mp_hops": 2}, r"mp_hops=2 with 1 row x 4 column"),
    ],
)
def test_rank_grid_refuses_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankGrid(**sizes)
