"""Triton functions that apply a rule to a piece of a row; kernels in fused.py call them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mempar.kernels.hashing import GOLDEN_GAMMA, MULTIPLIER_1, MULTIPLIER_2

_GOLDEN_GAMMA = tl.constexpr(GOLDEN_GAMMA % (1 << 64))
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1 % (1 << 64))
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2 % (1 << 64))


class Table(NamedTuple):
    """What kernels change: pointers or tensors, and sizes.

    Attributes:
        shard: `[S_i, D_j]`, the values; Triton's tuples have another attribute of that name.
        master: the same, or the values again where there is none.
        first: accumulator or first moment.
        second: second moment, or anything.
        shard_stride: from row to row of the values; the others have no gaps.
        num_columns: D_j.
    """

    shard: Any
    master: Any
    first: Any
    second: Any
    shard_stride: Any
    num_columns: Any


class RuleForm(NamedTuple):
    """Constants of a kernel that applies a rule.

    Attributes:
        wide: type of arithmetic.
        adagrad: whether the rule is row-wise Adagrad, else Adam.
        master: whether there is one.
        round_values: whether they are rounded stochastically.
        round_moments: the same for moments.
        quarters: whether a program's columns come in fours that share a hash.
        tile: columns of a tile, rounded up to a power of two.
        column_tile: columns of a tile.
        columns: of a program, in tiles rounded up.
    """

    wide: Any
    adagrad: bool
    master: bool
    round_values: bool
    round_moments: bool
    quarters: bool
    tile: int
    column_tile: int
    columns: int


@triton.jit
def _mix(x):
    """`mix` of kernels/hashing.py, of uint64."""
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def _noise16(key, slot, column, first, QUARTERS: tl.constexpr, COLUMNS: tl.constexpr):
    """16 random bits a column, uint32, as in rounding.py: a hash serves columns 4c to 4c + 3 of the table.

    With QUARTERS the columns are those from `first` on, a multiple of 4.
    """
    row_key = _mix(slot.to(tl.uint64) * _GOLDEN_GAMMA + key.to(tl.uint64))
    if QUARTERS:
        group = first // 4 + tl.arange(0, COLUMNS // 4)
        bits = _mix(row_key + group.to(tl.uint64) * _GOLDEN_GAMMA)
        low, high = bits.to(tl.uint32), (bits >> 32).to(tl.uint32)
        even, odd = tl.join(low & 0xFFFF, high & 0xFFFF), tl.join(low >> 16, high >> 16)
        noise = tl.reshape(tl.join(even, odd), [COLUMNS])
    else:
        bits = _mix(row_key + (column // 4).to(tl.uint64) * _GOLDEN_GAMMA)
        noise = ((bits >> (column % 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.uint32)
    return noise


@triton.jit
def _round(wide, key, slot, column, first, QUARTERS: tl.constexpr, COLUMNS: tl.constexpr):
    """Round float32 to one of the two bf16 numbers around it, at random; see rounding.py."""
    bits = wide.to(tl.uint32, bitcast=True) + _noise16(key, slot, column, first, QUARTERS, COLUMNS)
    upper = tl.where(wide == wide, bits >> 16, 0x7FC0)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _root(x, WIDE: tl.constexpr):
    """Square root, rounded correctly."""
    return tl.sqrt(x) if tl.float64 == WIDE else tl.sqrt_rn(x)


@triton.jit
def _quotient(x, y, WIDE: tl.constexpr):
    """Quotient, rounded correctly."""
    return x / y if tl.float64 == WIDE else tl.div_rn(x, y)


@triton.jit
def _adagrad(row, piece, weight, grad, table, rate, eps, FORM: tl.constexpr):
    """Add the tiles' mean squares to their statistics, and move values that have decayed."""
    TILES: tl.constexpr = FORM.columns // FORM.tile
    tile = piece * TILES + tl.arange(0, TILES)
    left = table.num_columns - tile * FORM.column_tile
    # The last tile of a table may be narrower.
    width = tl.maximum(tl.minimum(left, FORM.column_tile), 1).to(FORM.wide)
    squares = tl.sum(tl.reshape(grad * grad, [TILES, FORM.tile]), 1)
    place = table.first + row * tl.cdiv(table.num_columns, FORM.column_tile) + tile
    # Where there is no tile, any number does that can be divided by.
    accumulator = tl.load(place, mask=left > 0, other=1) + _quotient(squares, width, FORM.wide)
    # Where a tile spans warps, all of them read a statistic that one thread writes.
    tl.debug_barrier()
    tl.store(place, accumulator, mask=left > 0)
    pace = _quotient(tl.full([TILES], rate, FORM.wide), _root(accumulator, FORM.wide) + eps, FORM.wide)
    return weight - tl.reshape(tl.broadcast_to(pace[:, None], [TILES, FORM.tile]), [FORM.columns]) * grad


@triton.jit
def _adam(place, slot, column, first, inside, weight, grad, table, coefficients, keys, FORM: tl.constexpr):
    """Bring the moments up to date, and move values that have decayed."""
    _, _, rate, eps, beta1, beta2, correction = coefficients
    exp_avg = tl.load(table.first + place, mask=inside, other=0).to(FORM.wide)
    exp_avg_sq = tl.load(table.second + place, mask=inside, other=0).to(FORM.wide)
    exp_avg += (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + (grad * grad) * (1 - beta2)
    if FORM.round_moments:
        new_first = _round(exp_avg, keys[1], slot, column, first, FORM.quarters, FORM.columns)
        new_second = _round(exp_avg_sq, keys[2], slot, column, first, FORM.quarters, FORM.columns)
    else:
        new_first, new_second = exp_avg, exp_avg_sq
    tl.store(table.first + place, new_first, mask=inside)
    tl.store(table.second + place, new_second, mask=inside)
    # Not 0 / 0 where there is no column.
    denominator = tl.where(inside, _root(exp_avg_sq, FORM.wide) / correction + eps, 1)
    return weight - _quotient(rate * exp_avg, denominator, FORM.wide)


@triton.jit
def apply_rule(row, piece, column, inside, grad, kept, table, coefficients, place_of_shard, keys, FORM: tl.constexpr):
    """Update columns of a row, of which some are inside: values, master and state.

    Args:
        row: of the shard.
        piece: which columns of the row, in programs.
        column: `[columns]`, of the shard.
        inside: `[columns]`, whether it exists.
        grad: `[columns]`, gradient before it is scaled.
        kept: `[columns]`, what was read of the values or their master.
        table: a `Table`.
        coefficients: scale, decay, rate, eps, beta1, beta2, correction: in double, see `_coefficients` in fused.py.
        place_of_shard: its first slot and column in the table.
        keys: of the streams of random bits: of the values, of the first moment, of the second.
        FORM: a `RuleForm`.
    """
    # Coefficients must not widen float32 arithmetic.
    scale = tl.full([], coefficients[0], FORM.wide)
    decay = tl.full([], coefficients[1], FORM.wide)
    rate = tl.full([], coefficients[2], FORM.wide)
    eps = tl.full([], coefficients[3], FORM.wide)
    beta1 = tl.full([], coefficients[4], FORM.wide)
    beta2 = tl.full([], coefficients[5], FORM.wide)
    correction = tl.full([], coefficients[6], FORM.wide)
    slot, place = row + place_of_shard[0], row * table.num_columns + column
    first = place_of_shard[1] + piece * FORM.columns
    table_column = place_of_shard[1] + column
    grad *= scale
    weight = kept.to(FORM.wide) * decay
    if FORM.adagrad:
        weight = _adagrad(row, piece, weight, grad, table, rate, eps, FORM)
    else:
        wide = (scale, decay, rate, eps, beta1, beta2, correction)
        weight = _adam(place, slot, table_column, first, inside, weight, grad, table, wide, keys, FORM)
    if FORM.master:
        tl.store(table.master + place, weight, mask=inside)
    target = table.shard + row * table.shard_stride + column
    if FORM.round_values:
        rounded = _round(weight, keys[0], slot, table_column, first, FORM.quarters, FORM.columns)
        tl.store(target, rounded, mask=inside)
    else:
        tl.store(target, weight.to(table.shard.dtype.element_ty), mask=inside)
