"""How much torch's implementations take at a time, which bounds their temporaries; nothing here imports torch."""

# Elements of a shard that an update changes at a time.
CHUNK_ELEMENTS = 1 << 20
# Elements of gradient parts and sums that are made at a time, and the least width of a block of columns (below
# it reading rows wastes cache lines).
_BLOCK_ELEMENTS = 1 << 20
_BLOCK_COLUMNS = 32


def block_columns(num_bags: int, num_rows: int) -> int:
    """Columns that `reduce_row_parts` joins and sums at a time."""
    return max(_BLOCK_COLUMNS, _BLOCK_ELEMENTS // max(1, num_bags + num_rows))
