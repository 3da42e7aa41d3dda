"""Triton kernels of `row_update`: a touched row, or a piece of its columns, a program.

A program reads the row's values and state once, and writes them once; its gradient comes from memory, or is summed
from the row's entries as in reduce_rows/fused.py. A piece of columns is whole tiles, so pieces do not depend on each
other; only the gradients of the weights are products over all columns, and take whole rows. The order of operations is
that of native.py, and random bits are the same. No program writes what another one writes, nothing is atomic, and
addresses are computed in 64 bits.
"""

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.hashing import folded_key
from mempar.kernels.reduce_rows import fused as sums
from mempar.kernels.reduce_rows.segments import Entries, locate_entries
from mempar.kernels.row_update.fused_rules import apply_rule
from mempar.kernels.row_update.rounding import STREAMS
from mempar.kernels.row_update.rows import Adagrad, Rule, TableRows
from mempar.kernels.weighted_gather.fused import wide_type

# Columns of a program: the least keeps 8 to a thread, so that how a tile is summed does not depend on how many tiles
# a shard has.
_LEAST_COLUMNS, _MOST_COLUMNS = 256, 1024
# What changes from step to step or from shard to shard must not compile kernels anew.
_VARYING = ("row_start", "column_start", "values_key", "first_key", "second_key")


@triton.jit
def _columns_of(piece, num_columns, TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a piece, and which of them exist; tiles that are no power of two are padded."""
    each = tl.arange(0, COLUMNS)
    if COLUMN_TILE == TILE:
        column = piece * COLUMNS + each
        inside = column < num_columns
    else:
        column = piece * (COLUMNS // TILE * COLUMN_TILE) + each // TILE * COLUMN_TILE + each % TILE
        inside = (each % TILE < COLUMN_TILE) & (column < num_columns)
    return column, inside


@triton.jit(do_not_specialize=_VARYING)
def update_kernel(
    row_ptr,
    grad_ptr,
    grad_stride,
    values_ptr,
    master_ptr,
    first_ptr,
    second_ptr,
    values_stride,
    num_columns,
    scale: tl.float64,
    decay: tl.float64,
    rate: tl.float64,
    eps: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    correction: tl.float64,
    row_start: tl.int64,
    column_start: tl.int64,
    values_key: tl.int64,
    first_key: tl.int64,
    second_key: tl.int64,
    WIDE: tl.constexpr,
    ADAGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    ROUND_VALUES: tl.constexpr,
    ROUND_MOMENTS: tl.constexpr,
    QUARTERS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Apply a rule to a touched row's piece, given its gradient."""
    touched = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column, inside = _columns_of(piece, num_columns, TILE, COLUMN_TILE, COLUMNS)
    row = tl.load(row_ptr + touched).to(tl.int64)
    grad = tl.load(grad_ptr + touched * grad_stride + column, mask=inside, other=0).to(WIDE)
    source_ptr = master_ptr if MASTER else values_ptr
    source_stride = num_columns if MASTER else values_stride
    kept = tl.load(source_ptr + row * source_stride + column, mask=inside, other=0)
    apply_rule(
        row,
        piece,
        column,
        inside,
        grad,
        kept,
        values_ptr,
        master_ptr,
        first_ptr,
        second_ptr,
        values_stride,
        num_columns,
        scale,
        decay,
        rate,
        eps,
        beta1,
        beta2,
        correction,
        row_start,
        column_start,
        values_key,
        first_key,
        second_key,
        WIDE,
        ADAGRAD,
        MASTER,
        ROUND_VALUES,
        ROUND_MOMENTS,
        QUARTERS,
        TILE,
        COLUMN_TILE,
        COLUMNS,
    )


@triton.jit(do_not_specialize=_VARYING)
def reduce_update_kernel(
    row_ptr,
    bounds_ptr,
    first_piece_ptr,
    sums_ptr,
    place_ptr,
    weight_ptr,
    grad_ptr,
    wide_grad_ptr,
    is_wide_ptr,
    scores_ptr,
    order_ptr,
    values_ptr,
    master_ptr,
    first_ptr,
    second_ptr,
    values_stride,
    num_columns,
    scale: tl.float64,
    decay: tl.float64,
    rate: tl.float64,
    eps: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    correction: tl.float64,
    row_start: tl.int64,
    column_start: tl.int64,
    values_key: tl.int64,
    first_key: tl.int64,
    second_key: tl.int64,
    SUM_WIDE: tl.constexpr,
    MIXED: tl.constexpr,
    SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    ADAGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    ROUND_VALUES: tl.constexpr,
    ROUND_MOMENTS: tl.constexpr,
    QUARTERS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a row's entries and apply a rule; with SCORES, multiply their gradients with the row before it changes."""
    segment = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column, inside = _columns_of(piece, num_columns, TILE, COLUMN_TILE, COLUMNS)
    row = tl.load(row_ptr + segment).to(tl.int64)
    start = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    # Under way while the entries are read.
    source_ptr = master_ptr if MASTER else values_ptr
    source_stride = num_columns if MASTER else values_stride
    kept = tl.load(source_ptr + row * source_stride + column, mask=inside, other=0)
    if end - start > PIECE:
        first = tl.load(first_piece_ptr + segment)
        last = tl.load(first_piece_ptr + segment + 1)
        grad = sums.sum_pieces(first, last, sums_ptr, num_columns, column, inside, SUM_WIDE, COLUMNS)
    else:
        # What was read forward is the values, not their master.
        value = kept.to(SUM_WIDE)
        if SCORES and MASTER:
            value = tl.load(values_ptr + row * values_stride + column, mask=inside, other=0).to(SUM_WIDE)
        grad = sums.sum_entries(
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
            SUM_WIDE,
            MIXED,
            SCORES,
            ALIGNED,
            ENTRIES,
            COLUMNS,
        )
    # Read again rather than kept in registers, of which Adam with bf16 moments has two too few otherwise (sm_90).
    row = tl.load(row_ptr + segment, volatile=True).to(tl.int64)
    apply_rule(
        row,
        piece,
        column,
        inside,
        grad.to(WIDE),
        kept,
        values_ptr,
        master_ptr,
        first_ptr,
        second_ptr,
        values_stride,
        num_columns,
        scale,
        decay,
        rate,
        eps,
        beta1,
        beta2,
        correction,
        row_start,
        column_start,
        values_key,
        first_key,
        second_key,
        WIDE,
        ADAGRAD,
        MASTER,
        ROUND_VALUES,
        ROUND_MOMENTS,
        QUARTERS,
        TILE,
        COLUMN_TILE,
        COLUMNS,
    )


def update_rows(table: TableRows, rule: Rule, rows: Tensor, grad: Tensor, *, step: int, scale: float) -> None:
    """Apply a rule to touched rows `[U]` with gradients `[U, D_j]`; see the public operation."""
    width = table.values.shape[1]
    if len(rows) and width:
        tiles = _tiles(table, rule, whole=False)
        grid = (len(rows), triton.cdiv(width, _width_of_piece(tiles)))
        update_kernel[grid](
            rows, grad, grad.stride(0), **_table_arguments(table, rule, step, scale), **tiles, num_warps=_warps(tiles)
        )


def reduce_and_update(
    table: TableRows,
    rule: Rule,
    row_index: Tensor,
    weight: Tensor,
    bag_index: Tensor,
    grads: Sequence[Tensor],
    *,
    step: int,
    scale: float,
    scores: Tensor | None = None,
) -> Tensor:
    """Sum entries by row and apply a rule to the sums; see the public operation.

    Returns:
        `rows [U]`; the gradients of the weights are written to `scores [E]`, if given.
    """
    entries = locate_entries(row_index, weight, bag_index, grads)
    rows, width = entries.segments.rows, entries.num_columns
    if len(rows) and width:
        tiles = _tiles(table, rule, whole=scores is not None)
        partial = _sum_long_rows(table, entries, tiles, scores)
        constants = sums.tile_arguments(entries, tiles["COLUMNS"])
        constants["SUM_WIDE"] = constants.pop("WIDE")
        reduce_update_kernel[(len(rows), triton.cdiv(width, _width_of_piece(tiles)))](
            rows,
            entries.segments.bounds,
            entries.segments.first_piece,
            partial,
            *sums.gradient_arguments(entries),
            partial if scores is None else scores,
            entries.segments.order,
            **_table_arguments(table, rule, step, scale),
            PIECE=entries.segments.piece_entries,
            SCORES=scores is not None,
            **{**constants, **tiles},
        )
    return rows


def _sum_long_rows(table: TableRows, entries: Entries, tiles: dict[str, int], scores: Tensor | None) -> Tensor:
    # Tiles do not matter here; with scores a program takes a whole row.
    columns = triton.next_power_of_2(entries.num_columns)
    columns = max(columns, _LEAST_COLUMNS) if scores is not None else min(columns, _MOST_COLUMNS)
    return sums.sum_long_rows(entries, columns, table.values, scores)


def _tiles(table: TableRows, rule: Rule, *, whole: bool) -> dict[str, int]:
    """Columns of a program and of its tiles, in powers of two, and the columns of a tile that are used."""
    width = max(1, table.values.shape[1])
    if isinstance(rule, Adagrad):
        column_tile, num_tiles = rule.column_tile, rule.accumulator.shape[1]
        tile = triton.next_power_of_2(column_tile)
        columns = tile * triton.next_power_of_2(num_tiles)
        columns = max(columns if whole else min(columns, _MOST_COLUMNS), tile, _LEAST_COLUMNS)
        return {"TILE": tile, "COLUMN_TILE": column_tile, "COLUMNS": columns}
    columns = triton.next_power_of_2(width)
    columns = max(columns if whole else min(columns, _MOST_COLUMNS), _LEAST_COLUMNS)
    return {"TILE": columns, "COLUMN_TILE": columns, "COLUMNS": columns}


def _width_of_piece(tiles: dict[str, int]) -> int:
    """Columns of the table that a program takes."""
    return tiles["COLUMNS"] // tiles["TILE"] * tiles["COLUMN_TILE"]


def _warps(tiles: dict[str, int]) -> int:
    return sums.num_warps(tiles["COLUMNS"])


def _table_arguments(table: TableRows, rule: Rule, step: int, scale: float) -> dict[str, Any]:
    """What `apply_rule` is told about the table, its state and the step."""
    values, part = table.values, table.part
    arguments: dict[str, Any] = {
        "values_ptr": values,
        "master_ptr": values if table.master is None else table.master,
        "values_stride": values.stride(0),
        "num_columns": values.shape[1],
        "scale": float(scale),
        "decay": 1.0 - rule.lr * rule.weight_decay,
        "eps": float(rule.eps),
        "row_start": part.row_start,
        "column_start": part.column_start,
        "WIDE": wide_type(table.wide),
        "ADAGRAD": isinstance(rule, Adagrad),
        "MASTER": table.master is not None,
        "ROUND_VALUES": table.rounds,
    }
    if isinstance(rule, Adagrad):
        arguments |= {"first_ptr": rule.accumulator, "second_ptr": rule.accumulator, "rate": float(rule.lr)}
        arguments |= {"beta1": 0.0, "beta2": 0.0, "correction": 1.0, "ROUND_MOMENTS": False}
        aligned = rule.column_tile % 4 == 0 and rule.column_tile == triton.next_power_of_2(rule.column_tile)
    else:
        arguments |= {
            "first_ptr": rule.exp_avg,
            "second_ptr": rule.exp_avg_sq,
            "rate": rule.lr / (1.0 - rule.beta1**step),
            "beta1": float(rule.beta1),
            "beta2": float(rule.beta2),
            "correction": math.sqrt(1.0 - rule.beta2**step),
            "ROUND_MOMENTS": rule.exp_avg.dtype != table.wide,
        }
        aligned = True
    # A hash serves four columns of the table if a thread's four columns are those.
    arguments["QUARTERS"] = aligned and part.column_start % 4 == 0
    for name, stream in (("values_key", "values"), ("first_key", "exp_avg"), ("second_key", "exp_avg_sq")):
        draws = table.rounds if stream == "values" else arguments["ROUND_MOMENTS"]
        arguments[name] = folded_key((table.seed, step, STREAMS[stream])) if draws else 0
    return arguments
