"""The letters used for sizes everywhere in mempar, and the arithmetic of cutting a size in parts.

T  tokens (of one micro-batch on one rank, unless said otherwise)
C  model width (hidden size)
H  memory heads
N  sub-keys per half; S = N * N slots, slot = i1 * N + i2
Q  half-key width; a whole key is 2Q wide
K  rows read per head (top-k); M = H * K rows read per token and memory layer
D  value width
P  memory-parallel size; P = R row shards x W column shards
E  entries: (row, weight) pairs of all tokens at hand
U  distinct rows among some entries

Shapes are written in square brackets, outermost first: `[T, H, K] int64`. A share of a size is a
quotient: `[S/R, D/W]`. `slot_index` counts rows of the whole table, `row_index` rows of one shard.
"""

import itertools
from dataclasses import dataclass, replace


def even_cuts(total: int, num_parts: int) -> list[int]:
    """Cut `total` items into contiguous parts whose sizes differ by at most one.

    Args:
        total: number of items, at least 0.
        num_parts: number of parts, at least 1; parts may be empty when `total < num_parts`.

    Returns:
        `num_parts + 1` boundaries; part i is `[cuts[i], cuts[i + 1])`. Larger parts come first.
    """
    return [even_cut(total, num_parts, place) for place in range(num_parts + 1)]


def even_cut(total: int, num_parts: int, place: int) -> int:
    """One of the boundaries of `even_cuts`: where part `place` starts."""
    quotient, remainder = divmod(total, num_parts)
    return place * quotient + min(place, remainder)


def part_sizes(total: int, num_parts: int) -> list[int]:
    """Return the sizes of the parts that `even_cuts` makes."""
    cuts = even_cuts(total, num_parts)
    return [end - start for start, end in itertools.pairwise(cuts)]


@dataclass(frozen=True, kw_only=True)
class TableSlice:
    """The part of a table `[S, D]` that one rank holds: rows and columns, end excluded."""

    num_slots: int
    value_dim: int
    row_start: int
    row_end: int
    column_start: int
    column_end: int

    @property
    def num_rows(self) -> int:
        """S_i, rows of this shard."""
        return self.row_end - self.row_start

    @property
    def num_columns(self) -> int:
        """D_j, columns of this shard."""
        return self.column_end - self.column_start


def column_tiles(part: TableSlice, tile: int) -> TableSlice:
    """The slice of a tensor `[S, ceil(D / tile)]`, one number a row and tile, that belongs to a slice of the table.

    Args:
        part: a slice that starts and ends on a tile or at the end of the table.
        tile: columns of a tile.
    """
    assert part.column_start % tile == 0 and part.column_end in (part.value_dim, part.column_end // tile * tile)
    return replace(
        part,
        value_dim=-(-part.value_dim // tile),
        column_start=part.column_start // tile,
        column_end=-(-part.column_end // tile),
    )
