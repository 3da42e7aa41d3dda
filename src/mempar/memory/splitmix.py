"""The 64-bit mixing function of SplitMix64 (Steele, Lea, Flood 2014) on tensors, as two's complement int64.

Initial values and digests are functions of a position, mixed: nothing about them depends on who
computes them or in which order. Sums and products wrap around, which is arithmetic modulo 2^64.
"""

import hashlib

import torch
from torch import Tensor

# Odd, so that multiples of it visit every 64-bit number: spreads small integers before they are mixed.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift `int64` right as if it were unsigned; `bits` is 1 to 63."""
    # torch shifts int64 arithmetically; the mask makes it a logical shift.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Mix the bits of `int64` numbers; a bijection, so distinct numbers stay distinct."""
    x = (x ^ shift_right(x, 30)).mul_(_MULTIPLIER_1)
    x = (x ^ shift_right(x, 27)).mul_(_MULTIPLIER_2)
    return x ^ shift_right(x, 31)


def name_key(name: str, device: torch.device | None = None) -> Tensor:
    """A 64-bit key `[] int64` for a name."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    return torch.tensor(number, dtype=torch.int64, device=device)
