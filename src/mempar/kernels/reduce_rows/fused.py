"""Triton kernels of `reduce_rows`: sums over sorted entries, a row and piece of the columns a program.

Gradients are read where they lie, in pieces of 16 bytes a thread. Sums are kept in float32 (float64 for float64
gradients) and added in an order that depends on a row's own entries alone. Long rows are summed in pieces first. No
program writes what another one writes and nothing is atomic. Addresses are computed in 64 bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.reduce_rows.segments import Entries
from mempar.kernels.weighted_gather.fused import wide_type

# Bytes of a tile of gradient rows that a program holds at a time: 4 loads of 16 bytes a thread under way at 4 warps.
_TILE_BYTES = 4 * 32 * 4 * 16
# Entries at a time: the least, so that loads of whole rows overlap too, and the most.
_LEAST_ENTRIES, _MOST_ENTRIES = 2, 16
# Widest piece of a row that a program takes.
_MOST_COLUMNS = 1024
# Columns of a warp: 8 a thread.
_WARP_COLUMNS = 256


@triton.jit
def sum_entries(
    start,
    end,
    place_ptr,
    weight_ptr,
    grad_ptr,
    wide_grad_ptr,
    is_wide_ptr,
    column,
    inside,
    value,
    scores_ptr,
    order_ptr,
    WIDE: tl.constexpr,
    MIXED: tl.constexpr,
    SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the weighted gradients of sorted entries `[start, end)`; with SCORES, store their products with `value`."""
    total = tl.zeros([COLUMNS], WIDE)
    for first in tl.range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        live = entry < end
        place = tl.multiple_of(tl.load(place_ptr + entry, mask=live, other=0), ALIGNED)
        weight = tl.load(weight_ptr + entry, mask=live, other=0).to(WIDE)
        present = live[:, None] & inside[None, :]
        offset = place[:, None] + column[None, :]
        if MIXED:
            is_wide = tl.load(is_wide_ptr + entry, mask=live, other=0) != 0
            narrow = tl.load(grad_ptr + offset, mask=present & (is_wide == 0)[:, None], other=0).to(WIDE)
            wide = tl.load(wide_grad_ptr + offset, mask=present & is_wide[:, None], other=0).to(WIDE)
            grad = tl.where(is_wide[:, None], wide, narrow)
        else:
            grad = tl.load(grad_ptr + offset, mask=present, other=0).to(WIDE)
        total += tl.sum(grad * weight[:, None], 0)
        if SCORES:
            score = tl.sum(grad * value[None, :], 1)
            target = tl.load(order_ptr + entry, mask=live, other=0)
            tl.store(scores_ptr + target, score.to(scores_ptr.dtype.element_ty), mask=live)
    return total


@triton.jit
def sum_pieces(start, end, sums_ptr, num_columns, column, inside, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the sums of pieces `[start, end)` in order."""
    total = tl.zeros([COLUMNS], WIDE)
    for piece in tl.range(start, end):
        total += tl.load(sums_ptr + piece * num_columns + column, mask=inside, other=0).to(WIDE)
    return total


@triton.jit
def pieces_kernel(
    sums_ptr,
    pieces_ptr,
    piece_row_ptr,
    place_ptr,
    weight_ptr,
    grad_ptr,
    wide_grad_ptr,
    is_wide_ptr,
    num_pieces,
    num_columns,
    row_ptr,
    values_ptr,
    values_stride,
    scores_ptr,
    order_ptr,
    WIDE: tl.constexpr,
    MIXED: tl.constexpr,
    SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a piece of a long row; with SCORES, multiply its entries' gradients with the row's values."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    start = tl.load(pieces_ptr + piece)
    end = tl.load(pieces_ptr + num_pieces + piece)
    value = tl.zeros([COLUMNS], WIDE)
    if SCORES:
        row = tl.load(row_ptr + tl.load(piece_row_ptr + piece)).to(tl.int64)
        value = tl.load(values_ptr + row * values_stride + column, mask=inside, other=0).to(WIDE)
    total = sum_entries(
        start,
        end,
        place_ptr,
        weight_ptr,
        grad_ptr,
        wide_grad_ptr,
        is_wide_ptr,
        column,
        inside,
        value,
        scores_ptr,
        order_ptr,
        WIDE,
        MIXED,
        SCORES,
        ALIGNED,
        ENTRIES,
        COLUMNS,
    )
    tl.store(sums_ptr + piece * num_columns + column, total, mask=inside)


@triton.jit
def rows_kernel(
    out_ptr,
    bounds_ptr,
    first_piece_ptr,
    sums_ptr,
    place_ptr,
    weight_ptr,
    grad_ptr,
    wide_grad_ptr,
    is_wide_ptr,
    num_columns,
    WIDE: tl.constexpr,
    MIXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the sum of a row: of its entries, or of its pieces' sums."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    start = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    if end - start > PIECE:
        first = tl.load(first_piece_ptr + segment)
        last = tl.load(first_piece_ptr + segment + 1)
        total = sum_pieces(first, last, sums_ptr, num_columns, column, inside, WIDE, COLUMNS)
    else:
        total = sum_entries(
            start,
            end,
            place_ptr,
            weight_ptr,
            grad_ptr,
            wide_grad_ptr,
            is_wide_ptr,
            column,
            inside,
            0,
            out_ptr,
            place_ptr,
            WIDE,
            MIXED,
            False,
            ALIGNED,
            ENTRIES,
            COLUMNS,
        )
    tl.store(out_ptr + segment * num_columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(entries: Entries) -> Tensor:
    """Sum the entries of every row.

    Returns:
        `[U, D']`, the dtype of the weights.
    """
    num_rows, width = len(entries.segments.rows), entries.num_columns
    out = entries.weight.new_empty(num_rows, width)
    if num_rows and width:
        columns = min(triton.next_power_of_2(width), _MOST_COLUMNS)
        sums = sum_long_rows(entries, columns)
        rows_kernel[(num_rows, triton.cdiv(width, columns))](
            out,
            entries.segments.bounds,
            entries.segments.first_piece,
            sums,
            *gradient_arguments(entries),
            width,
            PIECE=entries.segments.piece_entries,
            **tile_arguments(entries, columns),
        )
    return out


def sum_long_rows(entries: Entries, columns: int, values: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
    """Sum the pieces of long rows.

    Args:
        entries: what is summed.
        columns: columns of a program, all with scores.
        values: `[S', D']`, with scores.
        scores: `[E]`: products of the pieces' entries with their rows' values are written here.

    Returns:
        `[pieces, D']` in float32 at least.
    """
    segments, width = entries.segments, entries.num_columns
    num_pieces = segments.pieces.shape[1]
    wide = torch.promote_types(entries.weight.dtype, torch.float32)
    sums = entries.weight.new_empty(num_pieces, width, dtype=wide)
    if num_pieces:
        pieces_kernel[(num_pieces, triton.cdiv(width, columns))](
            sums,
            segments.pieces,
            segments.piece_row,
            *gradient_arguments(entries),
            num_pieces,
            width,
            segments.rows,
            sums if values is None else values,
            0 if values is None else values.stride(0),
            sums if scores is None else scores,
            segments.order,
            SCORES=scores is not None,
            **tile_arguments(entries, columns),
        )
    return sums


def gradient_arguments(entries: Entries) -> tuple[Tensor, ...]:
    """Where kernels find places, weights and gradients."""
    return (
        entries.place,
        entries.weight,
        entries.base,
        entries.base if entries.wide_base is None else entries.wide_base,
        # Not read where there is one dtype.
        entries.place if entries.is_wide is None else entries.is_wide,
    )


def tile_arguments(entries: Entries, columns: int) -> dict[str, Any]:
    """The constants of a kernel that sums so many columns."""
    at_once = _TILE_BYTES // (columns * entries.base.element_size())
    return {
        "WIDE": wide_type(torch.promote_types(entries.weight.dtype, entries.base.dtype)),
        "MIXED": entries.is_wide is not None,
        "ALIGNED": entries.aligned,
        "ENTRIES": max(_LEAST_ENTRIES, min(_MOST_ENTRIES, at_once)),
        "COLUMNS": columns,
        "num_warps": num_warps(columns),
    }


def num_warps(columns: int) -> int:
    """Warps of a program that takes so many columns of a row, a power of two."""
    return max(1, min(16, columns // _WARP_COLUMNS))
