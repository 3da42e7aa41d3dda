"""CRC-32 of bytes that are written in parts: the checksum that zip files carry, and with them torch's.

The CRC of two stretches of bytes follows from the CRCs of each and the length of the second, so parts of a file are
written and checked independently of each other and the file's own checksum still comes out right. Numbers are
polynomials over GF(2), the coefficient of x^0 in the highest of 32 bits, as in zlib.
"""

from collections.abc import Iterable
from functools import lru_cache

# CRC-32 as in ISO 3309 and zip: x^32 + x^26 + ... + 1, in the order of bits above.
_POLYNOMIAL = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def combined(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC of stretches of bytes that follow one another.

    Args:
        parts: CRC and number of bytes of each.
    """
    total = 0
    for crc, num_bytes in parts:
        total = _times(_shift(num_bytes), total) ^ crc
    return total


def _times(left: int, right: int) -> int:
    product, bit = 0, _ONE
    while bit:
        if left & bit:
            product ^= right
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
        bit >>= 1
    return product


# Parts but the last have one length.
@lru_cache(maxsize=64)
def _shift(num_bytes: int) -> int:
    """The polynomial x to the power of the number of bits."""
    power, square, bits = _ONE, _X, 8 * num_bytes
    while bits:
        if bits & 1:
            power = _times(power, square)
        square, bits = _times(square, square), bits >> 1
    return power
