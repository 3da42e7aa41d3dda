"""Triton kernels of `reduce_rows`: sums over sorted entries, a row and piece of the columns a program.

Gradients are read where they lie, in pieces of 16 bytes a thread. Sums are kept in float32 (float64 for float64
gradients) and added in an order that depends on a row's own entries alone. Long rows are summed in pieces first. No
program writes what another one writes and nothing is atomic. Addresses are computed in 64 bits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.reduce_rows.segments import Entries
from mempar.kernels.weighted_gather.fused import wide_type

# Bytes of gradient rows that a thread of 8 columns loads at a time: how many entries are summed together, and so the
# order of a sum, does not depend on how many columns a shard has, unless it is narrower than a warp.
_THREAD_BYTES, _THREAD_COLUMNS = 64, 8
_LEAST_ENTRIES, _NARROW_ENTRIES = 2, 16
# Widest piece of a row that a program takes.
_MOST_COLUMNS = 1024
# Columns of a warp: 8 a thread.
_WARP_COLUMNS = 256


class Gradients(NamedTuple):
    """What kernels read of sorted entries, see `segments.Entries`: pointers or tensors."""

    place: Any
    weight: Any
    narrow: Any
    wide: Any
    is_wide: Any


class SumForm(NamedTuple):
    """Constants of a kernel that sums entries.

    Attributes:
        wide: type of arithmetic.
        mixed: whether gradients are of two dtypes.
        scores: whether the products of gradients with their rows' values are stored.
        aligned: numbers that every gradient row starts on a multiple of.
        piece: entries of the longest row that is not cut.
        entries: how many are read at a time.
        columns: of a program.
    """

    wide: Any
    mixed: bool
    scores: bool
    aligned: int
    piece: int
    entries: int
    columns: int


@triton.jit
def sum_entries(start, end, gradients, column, inside, value, scores_ptr, order_ptr, FORM: tl.constexpr):
    """Sum the weighted gradients of sorted entries `[start, end)`; with scores, store their products with `value`."""
    ALIGNED: tl.constexpr = FORM.aligned
    total = tl.full([FORM.columns], 0, FORM.wide)
    for first in tl.range(start, end, FORM.entries):
        entry = first + tl.arange(0, FORM.entries)
        live = entry < end
        place = tl.multiple_of(tl.load(gradients.place + entry, mask=live, other=0), ALIGNED)
        weight = tl.load(gradients.weight + entry, mask=live, other=0).to(FORM.wide)
        present = live[:, None] & inside[None, :]
        offset = place[:, None] + column[None, :]
        if FORM.mixed:
            is_wide = tl.load(gradients.is_wide + entry, mask=live, other=0) != 0
            narrow = tl.load(gradients.narrow + offset, mask=present & (is_wide == 0)[:, None], other=0).to(FORM.wide)
            wide = tl.load(gradients.wide + offset, mask=present & is_wide[:, None], other=0).to(FORM.wide)
            grad = tl.where(is_wide[:, None], wide, narrow)
        else:
            grad = tl.load(gradients.narrow + offset, mask=present, other=0).to(FORM.wide)
        total += tl.sum(grad * weight[:, None], 0)
        if FORM.scores:
            score = tl.sum(grad * value[None, :], 1)
            target = tl.load(order_ptr + entry, mask=live, other=0)
            tl.store(scores_ptr + target, score.to(scores_ptr.dtype.element_ty), mask=live)
    return total


@triton.jit
def sum_pieces(start, end, sums_ptr, num_columns, column, inside, FORM: tl.constexpr):
    """Add the sums of pieces `[start, end)` in order."""
    total = tl.full([FORM.columns], 0, FORM.wide)
    for piece in tl.range(start, end):
        total += tl.load(sums_ptr + piece * num_columns + column, mask=inside, other=0).to(FORM.wide)
    return total


@triton.jit(do_not_specialize=("num_pieces",))
def pieces_kernel(
    sums_ptr,
    pieces_ptr,
    piece_row_ptr,
    num_pieces,
    num_columns,
    gradients,
    row_ptr,
    values_ptr,
    values_stride,
    scores_ptr,
    order_ptr,
    FORM: tl.constexpr,
):
    """Sum a piece of a long row; with scores, multiply its entries' gradients with the row's values."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * FORM.columns + tl.arange(0, FORM.columns)
    inside = column < num_columns
    start = tl.load(pieces_ptr + piece)
    end = tl.load(pieces_ptr + num_pieces + piece)
    value = tl.full([FORM.columns], 0, FORM.wide)
    if FORM.scores:
        row = tl.load(row_ptr + tl.load(piece_row_ptr + piece)).to(tl.int64)
        value = tl.load(values_ptr + row * values_stride + column, mask=inside, other=0).to(FORM.wide)
    total = sum_entries(start, end, gradients, column, inside, value, scores_ptr, order_ptr, FORM)
    tl.store(sums_ptr + piece * num_columns + column, total, mask=inside)


@triton.jit
def rows_kernel(out_ptr, bounds_ptr, first_piece_ptr, sums_ptr, order_ptr, num_columns, gradients, FORM: tl.constexpr):
    """Write the sum of a row: of its entries, or of its pieces' sums."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * FORM.columns + tl.arange(0, FORM.columns)
    inside = column < num_columns
    start = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    if end - start > FORM.piece:
        first = tl.load(first_piece_ptr + segment)
        last = tl.load(first_piece_ptr + segment + 1)
        total = sum_pieces(first, last, sums_ptr, num_columns, column, inside, FORM)
    else:
        total = sum_entries(start, end, gradients, column, inside, 0, out_ptr, order_ptr, FORM)
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
            entries.segments.order,
            width,
            gradients_of(entries),
            FORM=sum_form(entries, columns),
            num_warps=num_warps(columns),
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
            num_pieces,
            width,
            gradients_of(entries),
            segments.rows,
            sums if values is None else values,
            0 if values is None else values.stride(0),
            sums if scores is None else scores,
            segments.order,
            FORM=sum_form(entries, columns, scores=scores is not None),
            num_warps=num_warps(columns),
        )
    return sums


def gradients_of(entries: Entries) -> Gradients:
    """Where kernels find places, weights and gradients."""
    return Gradients(
        place=entries.place,
        weight=entries.weight,
        narrow=entries.base,
        # These are not read where there is one dtype.
        wide=entries.base if entries.wide_base is None else entries.wide_base,
        is_wide=entries.place if entries.is_wide is None else entries.is_wide,
    )


def sum_form(entries: Entries, columns: int, *, scores: bool = False) -> SumForm:
    """The constants of a kernel that sums so many columns."""
    at_once = max(_LEAST_ENTRIES, _THREAD_BYTES // (_THREAD_COLUMNS * entries.base.element_size()))
    # Programs of whole rows have many threads, and then too many registers.
    at_once = _LEAST_ENTRIES if scores else at_once
    return SumForm(
        wide=wide_type(torch.promote_types(entries.weight.dtype, entries.base.dtype)),
        mixed=entries.is_wide is not None,
        scores=scores,
        aligned=entries.aligned,
        piece=entries.segments.piece_entries,
        entries=at_once if columns >= _WARP_COLUMNS else _NARROW_ENTRIES,
        columns=columns,
    )


def num_warps(columns: int) -> int:
    """Warps of a program that takes so many columns of a row, a power of two."""
    return max(1, min(16, columns // _WARP_COLUMNS))
