"""Integers whose order is that of scores, ties included: parts of the kernels of `product_topk`.

A score and the number of what has it are packed into one integer: a sort of such integers is exact, puts the lowest
number first among equal scores, and needs no second array.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(score):
    """int32 in the order of float32 scores; the two zeros are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(score, index, NARROW: tl.constexpr):
    """An integer that is the greater the better: by (score descending, index ascending).

    Of a bf16 score it has 32 bits, half of them for an index; of a float32 score 64, with 31 for an index.
    """
    if NARROW:
        return (ordered(score) & -0x10000) | (0xFFFF - index)
    else:
        return (ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def last_unless(known, number, NARROW: tl.constexpr):
    """Put what is not known behind everything else."""
    if NARROW:
        return tl.where(known, number, -0x80000000)
    else:
        return tl.where(known, number, -0x8000000000000000)


@triton.jit
def score_of(number, NARROW: tl.constexpr):
    """The float32 score that an integer packs."""
    if NARROW:
        high = number & -0x10000
        return (high ^ ((high >> 31) & 0x7FFF0000)).to(tl.float32, bitcast=True)
    else:
        high = (number >> 32).to(tl.int32)
        return (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(number, NARROW: tl.constexpr):
    """The int32 index that an integer packs."""
    if NARROW:
        return 0xFFFF - (number & 0xFFFF)
    else:
        return 0x7FFFFFFF - (number & 0x7FFFFFFF).to(tl.int32)
