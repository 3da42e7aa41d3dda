"""Initial values of a table, each number a function of (seed, slot, column) alone.

A counter-based generator lets every rank make exactly its own slice: the same table comes out
whatever the layout, and no rank makes or holds more than it owns.
"""

import math

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.hashing import hashed_bits, shift_right

# Elements made at a time: bounds the temporaries (8 bytes each, a few of them) to some 100 MB.
_CHUNK_ELEMENTS = 1 << 21


def hashed_normal(seed: int, slot: Tensor, column: Tensor) -> Tensor:
    """Standard normal numbers, one for each pair of a slot and a column.

    Args:
        seed: any integer of 64 bits.
        slot: `[rows] int64`.
        column: `[columns] int64`.

    Returns:
        `[rows, columns] float64`, by Box and Muller from two 32-bit halves of one 64-bit hash.
    """
    bits = hashed_bits((seed,), slot, column)
    radius = shift_right(bits, 32).double().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFFFF).double().mul_(2.0**-32 * 2.0 * math.pi).cos_()
    return radius.mul_(angle)


def row_values(
    slot: Tensor, column: Tensor, *, value_dim: int, seed: int, number: int = 0, dtype: torch.dtype
) -> Tensor:
    """Return rows of table `number` of a model, drawn from normal(0, D^-1/2), wherever they lie.

    Args:
        slot: `[rows] int64`.
        column: `[columns] int64`.
        value_dim: D.
        seed: of the model.
        number: of the table.
        dtype: of the values.

    Returns:
        `[rows, columns]`.
    """
    return hashed_normal(seed + (number << 32), slot, column).mul_(value_dim**-0.5).to(dtype)


def table_values(part: TableSlice, *, seed: int, number: int = 0, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the slice `[S_i, D_j]` of table `number` of a model; see `row_values`."""
    values = torch.empty(part.num_rows, part.num_columns, dtype=dtype, device=device)
    column = torch.arange(part.column_start, part.column_end, device=device)
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, part.num_columns))
    for start in range(0, part.num_rows, rows_at_once):
        block = values[start : start + rows_at_once]
        slot = torch.arange(part.row_start + start, part.row_start + start + len(block), device=device)
        block.copy_(row_values(slot, column, value_dim=part.value_dim, seed=seed, number=number, dtype=dtype))
    return values
