"""Triton kernels of `row_update`: a touched row, or a piece of its columns, a program.

A program reads the row's values and state once, and writes them once; its gradient comes from memory, or is summed
from the row's entries as in reduce_rows/fused.py. A piece of columns is whole tiles, so pieces do not depend on each
other; only the gradients of the weights are products over all columns, and take whole rows. The order of operations is
that of native.py, and random bits are the same. No program writes what another one writes, nothing is atomic, and
addresses are computed in 64 bits.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.hashing import folded_key
from mempar.kernels.reduce_rows import fused as sums
from mempar.kernels.reduce_rows.segments import Entries, locate_entries
from mempar.kernels.row_update.fused_rules import RuleForm, Table, apply_rule
from mempar.kernels.row_update.rounding import STREAMS
from mempar.kernels.row_update.rows import Adagrad, Rule, TableRows
from mempar.kernels.weighted_gather.fused import wide_type

# Columns of a program: the least keeps 8 to a thread, so that how a tile is summed does not depend on how many tiles
# a shard has.
_LEAST_COLUMNS, _MOST_COLUMNS = 256, 1024
# What changes from step to step or from shard to shard must not compile kernels anew.
_VARYING = ("row_start", "column_start", "values_key", "first_key", "second_key")


@triton.jit
def _columns_of(piece, num_columns, FORM: tl.constexpr):
    """Columns of a piece, and which of them exist; tiles that are no power of two are padded."""
    each = tl.arange(0, FORM.columns)
    if FORM.column_tile == FORM.tile:
        column = piece * FORM.columns + each
        inside = column < num_columns
    else:
        first = piece * (FORM.columns // FORM.tile * FORM.column_tile)
        column = first + each // FORM.tile * FORM.column_tile + each % FORM.tile
        inside = (each % FORM.tile < FORM.column_tile) & (column < num_columns)
    return column, inside


@triton.jit
def _read(table, row, column, inside, FORM: tl.constexpr):
    """Values that an update starts from, as they are kept."""
    if FORM.master:
        kept = tl.load(table.master + row * table.num_columns + column, mask=inside, other=0)
    else:
        kept = tl.load(table.shard + row * table.shard_stride + column, mask=inside, other=0)
    return kept


@triton.jit(do_not_specialize=_VARYING)
def update_kernel(
    row_ptr,
    grad_ptr,
    grad_stride,
    table,
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
    FORM: tl.constexpr,
):
    """Apply a rule to a touched row's piece, given its gradient."""
    touched = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column, inside = _columns_of(piece, table.num_columns, FORM)
    row = tl.load(row_ptr + touched).to(tl.int64)
    grad = tl.load(grad_ptr + touched * grad_stride + column, mask=inside, other=0).to(FORM.wide)
    kept = _read(table, row, column, inside, FORM)
    coefficients = (scale, decay, rate, eps, beta1, beta2, correction)
    keys = (values_key, first_key, second_key)
    apply_rule(row, piece, column, inside, grad, kept, table, coefficients, (row_start, column_start), keys, FORM)


@triton.jit(do_not_specialize=_VARYING)
def reduce_update_kernel(
    row_ptr,
    bounds_ptr,
    first_piece_ptr,
    sums_ptr,
    gradients,
    scores_ptr,
    order_ptr,
    table,
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
    SUM: tl.constexpr,
    FORM: tl.constexpr,
):
    """Sum a row's entries and apply a rule; with scores, multiply their gradients with the row before it changes."""
    segment = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column, inside = _columns_of(piece, table.num_columns, FORM)
    row = tl.load(row_ptr + segment).to(tl.int64)
    start, end = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    # Under way while the entries are read.
    kept = _read(table, row, column, inside, FORM)
    if end - start > SUM.piece:
        first, last = tl.load(first_piece_ptr + segment), tl.load(first_piece_ptr + segment + 1)
        grad = sums.sum_pieces(first, last, sums_ptr, table.num_columns, column, inside, SUM)
    else:
        # What was read forward is the values, not their master.
        value = kept.to(SUM.wide)
        if SUM.scores and FORM.master:
            value = tl.load(table.shard + row * table.shard_stride + column, mask=inside, other=0).to(SUM.wide)
        grad = sums.sum_entries(start, end, gradients, column, inside, value, scores_ptr, order_ptr, SUM)
    if FORM.round_moments:
        # Read again rather than kept in registers, of which Adam with bf16 moments has two too few otherwise (sm_90).
        row = tl.load(row_ptr + segment, volatile=True).to(tl.int64)
    coefficients = (scale, decay, rate, eps, beta1, beta2, correction)
    keys = (values_key, first_key, second_key)
    grad = grad.to(FORM.wide)
    apply_rule(row, piece, column, inside, grad, kept, table, coefficients, (row_start, column_start), keys, FORM)


def update_rows(table: TableRows, rule: Rule, rows: Tensor, grad: Tensor, *, step: int, scale: float) -> None:
    """Apply a rule to touched rows `[U]` with gradients `[U, D_j]`; see the public operation."""
    width = table.values.shape[1]
    if len(rows) and width:
        form = _rule_form(table, rule, whole=False)
        update_kernel[(len(rows), triton.cdiv(width, _width_of_piece(form)))](
            rows,
            grad,
            grad.stride(0),
            _table_of(table, rule),
            **_coefficients(rule, step, scale),
            **_random_bits(table, form, step),
            FORM=form,
            num_warps=sums.num_warps(form.columns),
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
        form = _rule_form(table, rule, whole=scores is not None)
        partial = _sum_long_rows(table, entries, scores)
        reduce_update_kernel[(len(rows), triton.cdiv(width, _width_of_piece(form)))](
            rows,
            entries.segments.bounds,
            entries.segments.first_piece,
            partial,
            sums.gradients_of(entries),
            partial if scores is None else scores,
            entries.segments.order,
            _table_of(table, rule),
            **_coefficients(rule, step, scale),
            **_random_bits(table, form, step),
            SUM=sums.sum_form(entries, form.columns, scores=scores is not None),
            FORM=form,
            num_warps=sums.num_warps(form.columns),
        )
    return rows


def _sum_long_rows(table: TableRows, entries: Entries, scores: Tensor | None) -> Tensor:
    # Tiles do not matter here; with scores a program takes a whole row.
    columns = triton.next_power_of_2(entries.num_columns)
    columns = max(columns, _LEAST_COLUMNS) if scores is not None else min(columns, _MOST_COLUMNS)
    return sums.sum_long_rows(entries, columns, table.values, scores)


def _rule_form(table: TableRows, rule: Rule, *, whole: bool) -> RuleForm:
    """The constants of a kernel that applies a rule, to whole rows or to pieces."""
    is_adagrad = isinstance(rule, Adagrad)
    width = max(1, table.values.shape[1])
    if is_adagrad:
        column_tile = rule.column_tile
        tile = triton.next_power_of_2(column_tile)
        columns = tile * triton.next_power_of_2(rule.accumulator.shape[1])
        columns = max(columns if whole else min(columns, _MOST_COLUMNS), tile, _LEAST_COLUMNS)
    else:
        columns = triton.next_power_of_2(width)
        columns = tile = column_tile = max(columns if whole else min(columns, _MOST_COLUMNS), _LEAST_COLUMNS)
    return RuleForm(
        wide=wide_type(table.wide),
        adagrad=is_adagrad,
        master=table.master is not None,
        round_values=table.rounds,
        round_moments=not is_adagrad and rule.exp_avg.dtype != table.wide,
        quarters=tile == column_tile and tile % 4 == 0 and table.part.column_start % 4 == 0,
        tile=tile,
        column_tile=column_tile,
        columns=columns,
    )


def _width_of_piece(form: RuleForm) -> int:
    """Columns of the table that a program takes."""
    return form.columns // form.tile * form.column_tile


def _table_of(table: TableRows, rule: Rule) -> Table:
    is_adagrad = isinstance(rule, Adagrad)
    return Table(
        shard=table.values,
        master=table.source,
        first=rule.accumulator if is_adagrad else rule.exp_avg,
        second=rule.accumulator if is_adagrad else rule.exp_avg_sq,
        shard_stride=table.values.stride(0),
        num_columns=table.values.shape[1],
    )


def _coefficients(rule: Rule, step: int, scale: float) -> dict[str, float]:
    """Numbers of a step: `rate` is over the correction of Adam's first moment, `correction` of the second's root."""
    numbers = {"scale": scale, "decay": 1.0 - rule.lr * rule.weight_decay, "eps": rule.eps}
    if isinstance(rule, Adagrad):
        numbers |= {"rate": rule.lr, "beta1": 0.0, "beta2": 0.0, "correction": 1.0}
    else:
        numbers |= {"rate": rule.lr / (1.0 - rule.beta1**step), "correction": math.sqrt(1.0 - rule.beta2**step)}
        numbers |= {"beta1": rule.beta1, "beta2": rule.beta2}
    return {name: float(number) for name, number in numbers.items()}


def _random_bits(table: TableRows, form: RuleForm, step: int) -> dict[str, int]:
    """Where the shard lies, and the keys of the streams that are drawn from."""
    numbers = {"row_start": table.part.row_start, "column_start": table.part.column_start}
    for name, stream in (("values_key", "values"), ("first_key", "exp_avg"), ("second_key", "exp_avg_sq")):
        draws = form.round_values if stream == "values" else form.round_moments
        numbers[name] = folded_key((table.seed, step, STREAMS[stream])) if draws else 0
    return numbers
