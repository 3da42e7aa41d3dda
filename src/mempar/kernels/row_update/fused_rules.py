"""Triton functions that apply a rule to a piece of a row; kernels in fused.py call them."""

import triton
import triton.language as tl

from mempar.kernels.hashing import GOLDEN_GAMMA, MULTIPLIER_1, MULTIPLIER_2

_GOLDEN_GAMMA = tl.constexpr(GOLDEN_GAMMA % (1 << 64))
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1 % (1 << 64))
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2 % (1 << 64))


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
def _adagrad(
    row,
    piece,
    weight,
    grad,
    accumulator_ptr,
    num_columns,
    rate,
    eps,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the tiles' mean squares to their statistics, and move values that have decayed."""
    TILES: tl.constexpr = COLUMNS // TILE
    tile = piece * TILES + tl.arange(0, TILES)
    left = num_columns - tile * COLUMN_TILE
    # The last tile of a table may be narrower.
    width = tl.maximum(tl.minimum(left, COLUMN_TILE), 1).to(WIDE)
    squares = tl.sum(tl.reshape(grad * grad, [TILES, TILE]), 1)
    place = accumulator_ptr + row * tl.cdiv(num_columns, COLUMN_TILE) + tile
    # Where there is no tile, any number does that can be divided by.
    accumulator = tl.load(place, mask=left > 0, other=1) + _quotient(squares, width, WIDE)
    tl.store(place, accumulator, mask=left > 0)
    pace = _quotient(tl.full([TILES], rate, WIDE), _root(accumulator, WIDE) + eps, WIDE)
    return weight - tl.reshape(tl.broadcast_to(pace[:, None], [TILES, TILE]), [COLUMNS]) * grad


@triton.jit
def _adam(
    place,
    slot,
    column,
    first,
    inside,
    weight,
    grad,
    first_ptr,
    second_ptr,
    rate,
    eps,
    beta1,
    beta2,
    correction,
    first_key,
    second_key,
    WIDE: tl.constexpr,
    ROUND_MOMENTS: tl.constexpr,
    QUARTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Bring the moments up to date, and move values that have decayed."""
    exp_avg = tl.load(first_ptr + place, mask=inside, other=0).to(WIDE)
    exp_avg_sq = tl.load(second_ptr + place, mask=inside, other=0).to(WIDE)
    exp_avg += (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + (grad * grad) * (1 - beta2)
    if ROUND_MOMENTS:
        tl.store(first_ptr + place, _round(exp_avg, first_key, slot, column, first, QUARTERS, COLUMNS), mask=inside)
        tl.store(
            second_ptr + place, _round(exp_avg_sq, second_key, slot, column, first, QUARTERS, COLUMNS), mask=inside
        )
    else:
        tl.store(first_ptr + place, exp_avg, mask=inside)
        tl.store(second_ptr + place, exp_avg_sq, mask=inside)
    # Not 0 / 0 where there is no column.
    denominator = tl.where(inside, _root(exp_avg_sq, WIDE) / correction + eps, 1)
    return weight - _quotient(rate * exp_avg, denominator, WIDE)


@triton.jit
def apply_rule(
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
    """Update columns of a row `[COLUMNS]`, of which some are inside: values, master and state.

    `kept` is what was read of the values or their master; `rate` is the learning rate, for Adam over the correction of
    its first moment, and `correction` that of the root of its second; the keys are those of the streams of random bits.
    """
    # Coefficients come in double, and must not widen float32 arithmetic.
    scale, decay, rate = tl.full([], scale, WIDE), tl.full([], decay, WIDE), tl.full([], rate, WIDE)
    eps = tl.full([], eps, WIDE)
    slot, place = row + row_start, row * num_columns + column
    table_column, first = column + column_start, column_start + piece * COLUMNS
    grad *= scale
    weight = kept.to(WIDE) * decay
    if ADAGRAD:
        weight = _adagrad(row, piece, weight, grad, first_ptr, num_columns, rate, eps, WIDE, TILE, COLUMN_TILE, COLUMNS)
    else:
        weight = _adam(
            place,
            slot,
            table_column,
            first,
            inside,
            weight,
            grad,
            first_ptr,
            second_ptr,
            rate,
            eps,
            tl.full([], beta1, WIDE),
            tl.full([], beta2, WIDE),
            tl.full([], correction, WIDE),
            first_key,
            second_key,
            WIDE,
            ROUND_MOMENTS,
            QUARTERS,
            COLUMNS,
        )
    if MASTER:
        tl.store(master_ptr + place, weight, mask=inside)
    target = values_ptr + row * values_stride + column
    if ROUND_VALUES:
        tl.store(target, _round(weight, values_key, slot, table_column, first, QUARTERS, COLUMNS), mask=inside)
    else:
        tl.store(target, weight.to(values_ptr.dtype.element_ty), mask=inside)
