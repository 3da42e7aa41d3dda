"""Triton kernels of `weighted_gather` and `gather_scores`.

Both read every row once, in pieces of 16 bytes a thread, several rows at a time so that enough bytes are under way to
fill the memory's bandwidth; sums are kept in float32 (float64 for float64 tables) and rounded once. No program writes
what another one writes and nothing is atomic: results do not vary from run to run. Addresses are computed in 64 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of a tile of rows that a program holds at a time: 4 warps with 4 loads of 16 bytes a thread under way.
_TILE_BYTES = 4 * 32 * 4 * 16
# Widest piece of a row that a program takes.
_MOST_COLUMNS = 1024
# Entries that one program of `gather_scores` serves, so that an output gradient is read from cache but once.
_ENTRIES = 32
# Sizes that differ from call to call must not compile kernels anew.
_VARYING = ("num_entries",)
_NUM_WARPS = 4


@triton.jit
def gather_kernel(
    out_ptr,
    values_ptr,
    row_ptr,
    weight_ptr,
    offset_ptr,
    gate_ptr,
    num_columns,
    out_stride,
    values_stride,
    gate_stride,
    WIDE: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One bag and piece of the columns: its weighted rows are summed ROWS at a time."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    each = tl.arange(0, ROWS)
    start = tl.load(offset_ptr + bag).to(tl.int64)
    end = tl.load(offset_ptr + bag + 1).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for first in tl.range(start, end, ROWS):
        entry = first + each
        live = entry < end
        row = tl.load(row_ptr + entry, mask=live, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + entry, mask=live, other=0).to(WIDE)
        place = values_ptr + (row * values_stride)[:, None] + column[None, :]
        part = tl.load(place, mask=live[:, None] & inside[None, :], other=0)
        total += part.to(WIDE) * weight[:, None]
    out = tl.sum(total, 0)
    if GATED:
        gate = tl.load(gate_ptr + bag * gate_stride + column, mask=inside, other=0).to(WIDE)
        out *= gate / (1 + tl.exp(-gate))
    tl.store(out_ptr + bag * out_stride + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def scores_kernel(
    out_ptr,
    values_ptr,
    row_ptr,
    bag_ptr,
    grad_ptr,
    num_entries,
    num_columns,
    values_stride,
    grad_stride,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ENTRIES entries, ROWS at a time: products of their rows with the gradients of their bags."""
    start = tl.program_id(0).to(tl.int64) * ENTRIES
    for step in tl.range(0, ENTRIES, ROWS):
        entry = start + step + tl.arange(0, ROWS)
        live = entry < num_entries
        row = tl.load(row_ptr + entry, mask=live, other=0).to(tl.int64)
        bag = tl.load(bag_ptr + entry, mask=live, other=0).to(tl.int64)
        total = tl.zeros([ROWS, COLUMNS], WIDE)
        for first in tl.range(0, num_columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = live[:, None] & (column < num_columns)[None, :]
            part = tl.load(values_ptr + (row * values_stride)[:, None] + column[None, :], mask=inside, other=0)
            grad = tl.load(grad_ptr + (bag * grad_stride)[:, None] + column[None, :], mask=inside, other=0)
            total += part.to(WIDE) * grad.to(WIDE)
        tl.store(out_ptr + entry, tl.sum(total, 1).to(out_ptr.dtype.element_ty), mask=live)


def gather_into(
    out: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, gate: Tensor | None = None
) -> Tensor:
    """Write the weighted sums of all bags.

    Args:
        out: `[B, D']`, of any dtype and stride between rows.
        values: `[S', D']`, of any stride between rows.
        row_index: `[E] int32 or int64`.
        weight: `[E]`, of any dtype.
        offsets: `[B + 1] int32 or int64`.
        gate: `[B, D']`: the sums are multiplied by silu(gate).

    Returns:
        `out`.
    """
    num_bags, width = out.shape
    if num_bags and width:
        rows, columns = tile_shape(width, values.element_size())
        gather_kernel[(num_bags, triton.cdiv(width, columns))](
            out,
            values,
            row_index,
            weight,
            offsets,
            out if gate is None else gate,
            width,
            out.stride(0),
            values.stride(0),
            0 if gate is None else gate.stride(0),
            WIDE=wide_type(values.dtype),
            GATED=gate is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_NUM_WARPS,
        )
    return out


def scores_into(out: Tensor, values: Tensor, row_index: Tensor, bag_index: Tensor, grad: Tensor) -> Tensor:
    """Write `values[row_index[e]] . grad[bag_index[e]]` of all entries.

    Args:
        out: `[E]`, of any dtype.
        values: `[S', D']`, of any stride between rows.
        row_index: `[E] int32 or int64`.
        bag_index: `[E] int32 or int64`.
        grad: `[B, D']`, of any dtype and stride between rows.

    Returns:
        `out`.
    """
    num_entries = out.numel()
    if num_entries:
        rows, columns = tile_shape(values.shape[1], values.element_size())
        scores_kernel[(triton.cdiv(num_entries, _ENTRIES),)](
            out,
            values,
            row_index,
            bag_index,
            grad,
            num_entries,
            values.shape[1],
            values.stride(0),
            grad.stride(0),
            WIDE=wide_type(values.dtype),
            ENTRIES=_ENTRIES,
            ROWS=min(rows, _ENTRIES),
            COLUMNS=columns,
            num_warps=_NUM_WARPS,
        )
    return out


def tile_shape(num_columns: int, element_size: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of the tiles in which rows of so many columns are read."""
    columns = min(triton.next_power_of_2(max(1, num_columns)), _MOST_COLUMNS)
    return max(1, min(_ENTRIES, _TILE_BYTES // (columns * element_size))), columns


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """The type of arithmetic on numbers of a dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32
