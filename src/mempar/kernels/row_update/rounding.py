"""Keeping numbers in bf16 that change by less than bf16 resolves.

bf16 has eight bits of precision: near w its numbers are |w| / 128 to |w| / 256 apart, and rounding to
the nearest ignores any change below half of that. A table near 1/16 ignores updates below 1.2e-4 (a
step of the learning rate 1e-4) for ever. Three ways to keep bf16 values (`memory.rounding`):

`master`      float32 copies beside them take the updates; exact, 4 bytes an element more.
`stochastic`  w is rounded up with probability (w - below) / (above - below), else down: right on average,
              so that updates accumulate; no memory, and noise of one bf16 step.
`nearest`     updates below half a step are lost. It exists to be compared with, and must be asked for.

Adam's moments in bf16 (`memory.moments_dtype`) are always rounded stochastically. v shrinks by a factor of
at least b2 a step: for b2 above 1 - 1/512 = .998, rounding to the nearest never lets it shrink at all, and
a row that once saw a large gradient keeps its small steps for ever (tests/test_table_rounding.py shows it
at b2 = .999); below that, sums are merely biased. Stochastic rounding costs the same and is right on
average for every b2.

The random bits of an element come from (seed, step, which tensor, slot, column), slot and column of the
whole table: every layout, and every copy of a shard, rounds alike.
"""

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.hashing import hashed_bits

# Which tensor is rounded: part of the key, so that no two share their bits.
STREAMS = {"values": 0, "exp_avg": 1, "exp_avg_sq": 2}


class Rounder:
    """Rounds rows of one shard."""

    def __init__(self, part: TableSlice, seed: int) -> None:
        self.part, self.seed = part, seed

    def stochastic(self, wide: Tensor, index: Tensor | slice, step: int, stream: str) -> Tensor:
        """Round rows to one of the two bf16 numbers around each element.

        Args:
            wide: `[rows, D_j] float32`.
            index: which rows of the shard they are.
            step: the optimizer's step.
            stream: `values`, `exp_avg` or `exp_avg_sq`.

        Returns:
            `[rows, D_j] bfloat16`; a number that bf16 holds stays, infinities and NaN too.
        """
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=wide.device)
        noise = self._noise16(index + self.part.row_start, step, stream)
        # bf16 is the upper half of float32: adding 16 random bits carries into it with probability lower half / 2^16.
        # The magnitude is what grows, whatever the sign.
        bits = noise.add_(wide.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
        return torch.where(wide.isnan(), wide, bits.view(torch.float32)).to(torch.bfloat16)

    def _noise16(self, slot: Tensor, step: int, stream: str) -> Tensor:
        """16 random bits an element, `[rows, D_j] int32`: a hash serves four columns, 4c to 4c + 3."""
        start, end = self.part.column_start, self.part.column_end
        group = torch.arange(start // 4, -(-end // 4), device=slot.device)
        # The quarter of a hash that a column takes is fixed by the byte order, which is the same on every
        # machine that torch supports.
        quarters = hashed_bits((self.seed, step, STREAMS[stream]), slot, group).view(torch.int16)
        first = start - 4 * (start // 4)
        return quarters[:, first : first + end - start].int().bitwise_and_(0xFFFF)
