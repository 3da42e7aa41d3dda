"""Bins of counts for histograms: nothing, and then from each power of two to the next."""

from collections import Counter
from collections.abc import Iterable


def powers(largest: int) -> list[int]:
    """The bins of counts up to the largest, by their lowest counts."""
    return [0, *(2**power for power in range(max(1, largest).bit_length()))]


def by_powers(histogram: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Sum a histogram up by bins.

    Args:
        histogram: counts, from 0, and how many have each.

    Returns:
        By the lowest count of each bin, how many are in it.
    """
    found: Counter[int] = Counter()
    for count, number in histogram:
        found[1 << (count.bit_length() - 1) if count else 0] += number
    return dict(sorted(found.items()))


def range_label(low: int) -> str:
    """The counts of a bin, as an axis has them."""
    if low < 2:
        return str(low)
    return f"{_short(low)}–{_short(2 * low - 1)}" if low < 1024 else f"{_short(low)}+"  # noqa: RUF001


def _short(number: int) -> str:
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= unit:
            return f"{number // unit}{letter}"
    return str(number)
