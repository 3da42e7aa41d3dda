"""Where the table is cut: R row shards x W column shards, sizes that need not divide.

Columns are cut on tiles, because row statistics are kept per tile and must not straddle two shards.
"""

from dataclasses import dataclass

from mempar.dims import TableSlice, even_cut, even_cuts
from mempar.errors import ConfigError

# Rows of a shard are int32 on the wire and in gradient records.
MAX_SHARD_ROWS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The cuts of one table.

    Attributes:
        num_slots: S.
        value_dim: D.
        column_tile: columns that stay together.
        num_row_shards: R.
        num_column_shards: W.
    """

    num_slots: int
    value_dim: int
    column_tile: int
    num_row_shards: int
    num_column_shards: int

    def __post_init__(self) -> None:
        """Refuse grids that leave a shard without rows or columns."""
        tiles = -(-self.value_dim // self.column_tile)
        if self.num_column_shards > tiles:
            raise ConfigError(
                f"{self.num_column_shards} column shards need as many column tiles, but a table {self.value_dim} "
                f"wide has {tiles} of memory.column_tile={self.column_tile}; use fewer column shards (raise "
                "parallel.mp_rows) or a smaller memory.column_tile."
            )
        if self.num_row_shards > self.num_slots:
            raise ConfigError(
                f"{self.num_row_shards} row shards exceed the {self.num_slots} slots of the table; every shard "
                "needs a row; use fewer row shards."
            )
        if self.num_slots > MAX_SHARD_ROWS * self.num_row_shards:
            raise ConfigError(
                f"{self.num_slots} slots on {self.num_row_shards} row shards exceed {MAX_SHARD_ROWS} rows a shard; "
                "rows of a shard are numbered in 32 bits; use more row shards (parallel.mp_rows)."
            )

    @property
    def num_shards(self) -> int:
        """P."""
        return self.num_row_shards * self.num_column_shards

    @property
    def row_cuts(self) -> list[int]:
        """R + 1 boundaries of the row shards."""
        return even_cuts(self.num_slots, self.num_row_shards)

    @property
    def column_cuts(self) -> list[int]:
        """W + 1 boundaries of the column shards, each on a tile or at the end."""
        tiles = -(-self.value_dim // self.column_tile)
        return [min(cut * self.column_tile, self.value_dim) for cut in even_cuts(tiles, self.num_column_shards)]

    def row_shard(self, member: int) -> int:
        """Row shard of a member of the memory-parallel group."""
        return member % self.num_row_shards

    def column_shard(self, member: int) -> int:
        """Column shard of a member of the memory-parallel group."""
        return member // self.num_row_shards

    def columns_of(self, member: int) -> tuple[int, int]:
        """First column and end of a member's shard."""
        tiles, shard = -(-self.value_dim // self.column_tile), self.column_shard(member)
        start, end = (even_cut(tiles, self.num_column_shards, place) for place in (shard, shard + 1))
        return start * self.column_tile, min(end * self.column_tile, self.value_dim)

    def part_of(self, member: int) -> TableSlice:
        """The slice of the table that a member holds."""
        column_start, column_end = self.columns_of(member)
        row_shard = self.row_shard(member)
        return TableSlice(
            num_slots=self.num_slots,
            value_dim=self.value_dim,
            row_start=even_cut(self.num_slots, self.num_row_shards, row_shard),
            row_end=even_cut(self.num_slots, self.num_row_shards, row_shard + 1),
            column_start=column_start,
            column_end=column_end,
        )
