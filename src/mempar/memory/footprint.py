"""Bytes that a shard takes on its rank: values, optimizer state, and gradients on their way to the update.

A step passes two peaks, with weights and state held all the while. When records are summed by row, they,
their sorted index and the sums exist together; when the rows are updated, the sums and a block of
temporaries do. No term grows with S but the shard's own rows (under `adamw` too, whose work does).

    peak = values + state + U D_j g + max(records + 2 E (8 + g) + (B + U) c g, k c' g)

with E entries and B output gradients deposited, U rows touched, g bytes a number of arithmetic, c columns
joined at a time, c' elements updated at a time and k of their copies (4, or 6 with stochastic rounding).
Holders of copies send and receive each other's sums besides: 2 G U D_j g more in a group of G that touch U rows
each. Triton's kernels join no columns and update rows in place; they take an index of 45 bytes an entry instead of
8 + g, beside its row, bag and weight. Nothing here imports torch.
"""

from dataclasses import dataclass

from mempar.dims import TableSlice, column_tiles
from mempar.kernels.blocking import CHUNK_ELEMENTS, block_columns
from mempar.memory.config import MemoryConfig

# Bytes of a row or bag index in a record, and of a sorted position.
_INDEX_BYTES, _ORDER_BYTES = 4, 8
# Wide copies of a block of rows during an update: two moments, the values, a denominator or squares. Rounding has
# in place of the last its noise, the result wide and narrow, and the narrow one before it.
_UPDATE_COPIES, _ROUNDING_COPIES = 4, 2
# Of the kernels of reduce_rows/segments.py, at the most: rows in order 4, places in order 8, marks of first and long
# rows 2, numbers of rows 24 and of entries 8, less what is gone by then. Longer rows are summed in pieces.
_FUSED_INDEX_BYTES, _PIECE_ENTRIES = 45, 512


@dataclass(frozen=True, kw_only=True)
class Deposits:
    """What a step deposits in one shard.

    Attributes:
        entries: E, reads of the shard's rows by all members of the group, in all layers and micro-batches.
        tokens: B, output gradients that come with them.
        rows: U, distinct rows among the entries.
    """

    entries: int
    tokens: int
    rows: int


def values_bytes(part: TableSlice, value_bytes: int) -> int:
    """Bytes of the shard itself."""
    return part.num_rows * part.num_columns * value_bytes


def state_bytes(config: MemoryConfig, part: TableSlice, value_bytes: int) -> int:
    """Bytes of the optimizer's state beside a shard with `value_bytes` an element."""
    wide, elements = max(4, value_bytes), part.num_rows * part.num_columns
    master = wide * elements if value_bytes < 4 and config.rounding == "master" else 0
    if config.optimizer == "row_adagrad":
        return master + wide * part.num_rows * column_tiles(part, config.column_tile).num_columns
    return master + 2 * elements * (2 if config.moments_dtype == "bf16" else wide)


def record_bytes(deposits: Deposits, num_columns: int, value_bytes: int) -> int:
    """Bytes of the records: row, bag and weight an entry, an output gradient `[D_j]` a token."""
    entry_bytes = 2 * _INDEX_BYTES + value_bytes
    return deposits.entries * entry_bytes + deposits.tokens * num_columns * value_bytes


def sums_bytes(deposits: Deposits, num_columns: int, value_bytes: int) -> int:
    """Bytes of the rows' gradients `[U, D_j]`, in float32 at least."""
    return deposits.rows * num_columns * max(4, value_bytes)


def summing_bytes(deposits: Deposits, num_columns: int, value_bytes: int, *, fused: bool) -> int:
    """Bytes that exist beside records and sums while these are made.

    Args:
        deposits: what is summed.
        num_columns: D_j.
        value_bytes: of the values.
        fused: whether Triton's kernels sum.
    """
    wide = max(4, value_bytes)
    joined_entry = 2 * _INDEX_BYTES + wide
    if fused:
        pieces = deposits.entries // _PIECE_ENTRIES if deposits.entries > _PIECE_ENTRIES * deposits.rows else 0
        return deposits.entries * (joined_entry + _FUSED_INDEX_BYTES) + pieces * num_columns * wide
    joined = min(num_columns, block_columns(deposits.tokens, deposits.rows))
    index = deposits.entries * (joined_entry + _ORDER_BYTES + wide)
    return index + (deposits.tokens + deposits.rows) * joined * wide


def updating_bytes(config: MemoryConfig, deposits: Deposits, num_columns: int, value_bytes: int, *, fused: bool) -> int:
    """Bytes that exist beside the sums while rows are updated; arguments as in `summing_bytes`."""
    if fused:
        return 0
    rounds = config.moments_dtype == "bf16" or (value_bytes < 4 and config.rounding == "stochastic")
    copies = _UPDATE_COPIES + (_ROUNDING_COPIES if rounds else 0)
    return copies * min(CHUNK_ELEMENTS, deposits.rows * num_columns) * max(4, value_bytes)


def peak_bytes(config: MemoryConfig, part: TableSlice, value_bytes: int, deposits: Deposits) -> int:
    """Most bytes held at once in a step on a CPU, without copies on other ranks and with memory.deposit_bytes=0."""
    width = part.num_columns
    held = values_bytes(part, value_bytes) + state_bytes(config, part, value_bytes)
    summing = summing_bytes(deposits, width, value_bytes, fused=False)
    summing += record_bytes(deposits, width, value_bytes)
    updating = updating_bytes(config, deposits, width, value_bytes, fused=False)
    return held + sums_bytes(deposits, width, value_bytes) + max(summing, updating)
