"""Cutting a size in parts, and the part of a table that a rank holds."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mempar.dims import TableSlice, even_cuts, part_sizes

totals, part_counts = st.integers(0, 10**12), st.integers(1, 70)


@settings(deadline=None, max_examples=100)
@given(totals, part_counts)
@example(0, 3)
@example(2, 3)
@example(7, 1)
def test_even_cuts_differ_by_one_and_put_larger_parts_first(total: int, num_parts: int) -> None:
    cuts = even_cuts(total, num_parts)
    assert len(cuts) == num_parts + 1
    assert (cuts[0], cuts[-1]) == (0, total)
    sizes = [end - start for start, end in itertools.pairwise(cuts)]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 <= sizes[-1] <= sizes[0] <= sizes[-1] + 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), part_counts)
@example(0, 4)
def test_part_sizes_match_numpy_array_split(total: int, num_parts: int) -> None:
    parts = np.array_split(np.arange(total), num_parts)
    assert part_sizes(total, num_parts) == [len(part) for part in parts]
    cuts = even_cuts(total, num_parts)
    for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
        assert list(part) == list(range(start, end))


@settings(deadline=None, max_examples=50)
@given(totals, part_counts)
def test_even_cuts_are_integers_when_total_exceeds_float_precision(total: int, num_parts: int) -> None:
    # 2^60 + total is no float64: a cut computed in floating point would miss the end.
    assert even_cuts(2**60 + total, num_parts)[-1] == 2**60 + total
    assert sum(part_sizes(2**60 + total, num_parts)) == 2**60 + total


def test_table_slice_counts_its_own_rows_and_columns() -> None:
    part = TableSlice(num_slots=100, value_dim=24, row_start=30, row_end=37, column_start=8, column_end=19)
    assert (part.num_rows, part.num_columns) == (7, 11)
    empty = TableSlice(num_slots=100, value_dim=24, row_start=30, row_end=30, column_start=24, column_end=24)
    assert (empty.num_rows, empty.num_columns) == (0, 0)


def test_table_slice_is_frozen_and_keyword_only() -> None:
    part = TableSlice(num_slots=4, value_dim=4, row_start=0, row_end=4, column_start=0, column_end=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.row_end = 3
    with pytest.raises(TypeError):
        TableSlice(4, 4, 0, 4, 0, 4)
    assert {part: 1}[dataclasses.replace(part)] == 1
