"""Process groups of the memory dimension, made for real."""

import torch.distributed as dist

from mempar.parallel.groups import make_memory_groups
from mempar.parallel.ranks import RankGrid
from rank_pool import RankPool


def joined_ranks(mp: int, mp_rows: int) -> tuple[list[int], list[int]]:
    """World ranks of this rank's memory and copy groups, as torch sees them."""
    grid = RankGrid(world=dist.get_world_size(), mp=mp, mp_rows=mp_rows)
    groups, made = make_memory_groups(grid, dist.get_rank(), [(0,)], None)
    lists = []
    for group in (groups.memory, *groups.copies):
        ranks = [dist.get_rank()] if group.process_group is None else dist.get_process_group_ranks(group.process_group)
        assert ranks.index(dist.get_rank()) == group.rank and len(ranks) == group.size
        lists.append(ranks)
    for group in made:
        dist.destroy_process_group(group)
    return lists[0], lists[1]


def test_groups_are_what_the_rank_grid_says(pool: RankPool) -> None:
    assert pool.run(4, joined_ranks, 2, 2) == [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]
    assert pool.run(2, joined_ranks, 1, 1) == [([0], [0, 1]), ([1], [0, 1])]
