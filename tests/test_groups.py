"""Process groups of the memory dimension, made for real."""

import torch.distributed as dist

from mempar.parallel.groups import make_memory_groups
from mempar.parallel.ranks import RankGrid
from rank_pool import RankPool


def joined_ranks(mp: int, mp_rows: int, mp_hops: int = 1) -> dict[str, list[int]]:
    """World ranks of this rank's memory, hop and copy groups, as torch sees them."""
    grid = RankGrid(world=dist.get_world_size(), mp=mp, mp_rows=mp_rows, mp_hops=mp_hops)
    groups, made = make_memory_groups(grid, dist.get_rank(), [(0,)], None)
    lists = {}
    members = {"memory": groups.memory, "inside": groups.inside, "across": groups.across, "copies": groups.copies[0]}
    for name, group in members.items():
        ranks = [dist.get_rank()] if group.process_group is None else dist.get_process_group_ranks(group.process_group)
        assert ranks.index(dist.get_rank()) == group.rank and len(ranks) == group.size
        assert group.ledger is groups.ledger
        lists[name] = ranks
    for group in made:
        dist.destroy_process_group(group)
    return lists


def test_groups_are_what_the_rank_grid_says(pool: RankPool) -> None:
    found = [(ranks["memory"], ranks["copies"]) for ranks in pool.run(4, joined_ranks, 2, 2)]
    assert found == [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]
    alone = {"memory": [0], "inside": [0], "across": [0], "copies": [0, 1]}
    assert pool.run(2, joined_ranks, 1, 1)[0] == alone


def test_groups_of_a_two_hop_grid_are_its_column_and_row_shards(pool: RankPool) -> None:
    found = pool.run(6, joined_ranks, 6, 3, 2)
    assert [ranks["memory"] for ranks in found] == [list(range(6))] * 6
    assert [ranks["inside"] for ranks in found] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert [ranks["across"] for ranks in found] == [[0, 3], [1, 4], [2, 5]] * 2
    one_hop = pool.run(4, joined_ranks, 4, 2)
    assert [(ranks["inside"], ranks["across"]) for ranks in one_hop] == [([rank], [rank]) for rank in range(4)]
