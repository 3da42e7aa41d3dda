"""Cuts of a table."""

import random

import pytest
import torch

from mempar.errors import ConfigError
from thread_groups import plan_of


def test_shard_plan_cuts_the_table_without_gap_or_overlap(rng: random.Random) -> None:
    shapes = [(25, 7, 2, 3, 3), (10, 9, 4, 3, 3), (9, 6, 1, 1, 6), (7, 300, 128, 7, 3)]
    for _ in range(60):
        tile, tiles, num_slots = rng.randint(1, 5), rng.randint(1, 8), rng.randint(1, 30)
        value_dim = tile * tiles - rng.randrange(tile)
        shapes.append((num_slots, value_dim, tile, rng.randint(1, min(5, num_slots)), rng.randint(1, tiles)))
    for num_slots, value_dim, tile, num_rows, num_columns in shapes:
        plan = plan_of(num_rows, num_columns, num_slots, value_dim, tile)
        parts = [plan.part_of(member) for member in range(plan.num_shards)]
        holders = torch.zeros(num_slots, value_dim, dtype=torch.int64)
        for member, part in enumerate(parts):
            holders[part.row_start : part.row_end, part.column_start : part.column_end] += 1
            assert part.num_rows > 0 and part.num_columns > 0
            assert part.column_start % tile == 0
            assert part.column_end % tile == 0 or part.column_end == value_dim
            assert (part.num_slots, part.value_dim) == (num_slots, value_dim)
            # Rows are fastest.
            assert (plan.row_shard(member), plan.column_shard(member)) == (member % num_rows, member // num_rows)
            assert plan.columns_of(member) == (part.column_start, part.column_end)
            assert plan.row_cuts[member % num_rows] == part.row_start
        assert bool((holders == 1).all())
        assert len(parts) == num_rows * num_columns
        rows, tiles = [part.num_rows for part in parts], [-(-part.num_columns // tile) for part in parts]
        assert max(rows) - min(rows) <= 1 and max(tiles) - min(tiles) <= 1


def test_shard_plan_refuses_shards_without_rows_or_columns() -> None:
    with pytest.raises(ConfigError, match=r"3 column shards .* 256 wide has 2 of memory\.column_tile=128"):
        plan_of(1, 3, 25, 256, 128)
    with pytest.raises(ConfigError, match=r"10 row shards exceed the 9 slots"):
        plan_of(10, 1, 9)
    with pytest.raises(ConfigError, match=r"8589934592 slots on 4 row shards exceed 2147483647 rows"):
        plan_of(4, 1, 2**33)
    assert plan_of(5, 1, 2**33).row_cuts[-1] == 2**33
