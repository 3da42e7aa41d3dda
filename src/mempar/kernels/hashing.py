"""Bits that are a function of whole numbers alone: a counter-based generator, and keys for digests.

Whatever needs randomness for an element of a table draws it from the element's own place (slot,
column), so that any rank makes the bits of its slice, and only those, whatever the layout.
"""

import hashlib

import torch
from torch import Tensor

# 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014), as two's complement int64.
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)
# Odd, so that multiples of it visit every 64-bit number: spreads small integers before they are mixed.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift `int64` numbers as if they were unsigned, which torch does not."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hashed_bits(key: tuple[int, ...], slot: Tensor, column: Tensor) -> Tensor:
    """64 random bits for each pair of a slot and a column.

    Args:
        key: what the stream of bits depends on besides: a seed of 64 bits, then any other counters.
        slot: `[rows] int64`.
        column: `[columns] int64`.

    Returns:
        `[rows, columns] int64`.
    """
    row_key = mix(slot * GOLDEN_GAMMA + folded_key(key))
    return mix(row_key[:, None] + (column * GOLDEN_GAMMA)[None, :])


def folded_key(key: tuple[int, ...]) -> int:
    """Fold the key of a stream of bits into one number; a device need not be waited for."""
    first, *others = (torch.tensor(number, dtype=torch.int64, device="cpu") for number in key)
    folded = mix(first)
    for number in others:
        folded = mix(folded + number * GOLDEN_GAMMA)
    return int(folded)


def mix(x: Tensor) -> Tensor:
    """Mix the bits of `int64` numbers; a bijection, so distinct numbers stay distinct."""
    x = (x ^ shift_right(x, 30)).mul_(MULTIPLIER_1)
    x = (x ^ shift_right(x, 27)).mul_(MULTIPLIER_2)
    return x ^ shift_right(x, 31)


def name_key(name: str, device: torch.device | None = None) -> Tensor:
    """A 64-bit key `[] int64` for a name."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    return torch.tensor(number, dtype=torch.int64, device=device)
