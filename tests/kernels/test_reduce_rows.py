"""Sums of the entries of each row, against their reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bags import WIDTHS, assert_near, every_case, every_dtype, every_index_dtype, make_bags
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import reduce_row_parts, reduce_rows
from mempar.kernels.reduce_rows import reference as reduce_reference
from mempar.kernels.reduce_rows.segments import PIECE_ENTRIES, sort_segments
from mempar.kernels.weighted_gather import bag_of_entries


@every_case
@every_dtype
@every_index_dtype
def test_reduce_rows_matches_reference(
    case: str, dtype: torch.dtype, index_dtype: torch.dtype, backend: Backend
) -> None:
    for width in WIDTHS:
        _, row_index, weight, offsets, grad = make_bags(case, width, dtype, index_dtype)
        bag_index = bag_of_entries(offsets, len(row_index))
        rows, sums = reduce_rows(row_index, weight, bag_index, grad, backend=backend)
        expected_rows, expected = reduce_reference.reduce_rows(row_index, weight.double(), bag_index, grad.double())
        _, magnitude = reduce_reference.reduce_rows(row_index, weight.double().abs(), bag_index, grad.double().abs())
        assert rows.dtype == index_dtype
        assert rows.tolist() == sorted(set(row_index.tolist())) == expected_rows.tolist()
        assert_near(sums, expected, magnitude, dtype, len(row_index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reduced_row_is_bitwise_the_same_when_other_rows_interleave(dtype: torch.dtype, backend: Backend) -> None:
    grad, weight = torch.randn(40, 33, dtype=dtype), torch.randn(40, dtype=dtype)
    row_index = torch.randint(5, (40,), dtype=torch.int32)
    rows, sums = reduce_rows(row_index, weight, torch.arange(40), grad, backend=backend)
    for row, total in zip(rows.tolist(), sums, strict=True):
        mine = (row_index == row).nonzero().squeeze(1)
        _, alone = reduce_rows(row_index[mine], weight[mine], mine, grad, backend=backend)
        assert torch.equal(alone[0], total)


def hot_entries() -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows [E] of which one is cut in three pieces and one in two, weights, bags, and the number of bags."""
    rows = torch.cat([torch.full((2 * PIECE_ENTRIES + 70,), 4), torch.full((600,), 7), torch.tensor([0, 5, 5, 9])])
    rows = rows[torch.randperm(len(rows))].int()
    return rows, torch.randn(len(rows)), torch.randint(12, (len(rows),), dtype=torch.int32), 12


PARTS: dict[str, list[torch.dtype]] = {
    "bf16": [torch.bfloat16] * 3,
    "float32": [torch.float32] * 3,
    "sums-and-bf16": [torch.float32, torch.bfloat16, torch.bfloat16],
    "bf16-between": [torch.bfloat16, torch.float32, torch.bfloat16],
    "float64": [torch.float64] * 3,
}


@pytest.mark.parametrize("dtypes", PARTS)
@pytest.mark.parametrize(("width", "apart"), [(1, 0), (7, 3), (33, 0), (128, 8), (200, 3)])
def test_parts_are_reduced_where_they_lie(dtypes: str, width: int, apart: int, backend: Backend) -> None:
    row_index, weight, bag_index, num_bags = hot_entries()
    # Rows start on any number, or all on 16 bytes.
    whole = torch.full((num_bags, apart + width + apart), torch.nan)
    whole[:, apart : apart + width] = torch.randn(num_bags, width)
    sizes = [5, 0, num_bags - 5]
    grads = [
        part.to(dtype)[:, apart : apart + width] for part, dtype in zip(whole.split(sizes), PARTS[dtypes], strict=True)
    ]
    wide = torch.float64 if dtypes == "float64" else torch.float32
    rows, sums = reduce_row_parts(row_index, weight.to(wide), bag_index, grads, backend=backend)
    joined = torch.cat([grad.double() for grad in grads])
    expected_rows, expected = reduce_reference.reduce_rows(row_index, weight.double(), bag_index, joined)
    _, magnitude = reduce_reference.reduce_rows(row_index, weight.double().abs(), bag_index, joined.abs())
    assert rows.dtype == torch.int32 and rows.tolist() == expected_rows.tolist()
    assert_near(sums, expected, magnitude, wide, len(row_index))
    again = reduce_row_parts(row_index, weight.to(wide), bag_index, grads, backend=backend)
    assert torch.equal(again[0], rows) and torch.equal(again[1], sums)


def test_parts_refuse_shapes_that_do_not_fit(backend: Backend) -> None:
    index, weight, grad = torch.zeros(3, dtype=torch.int32), torch.zeros(3), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"weight is \[2\]"):
        reduce_row_parts(index, weight[:2], index, [grad], backend=backend)
    with pytest.raises(ValueError, match="bag_index is"):
        reduce_rows(index, weight, index[:2], grad, backend=backend)
    with pytest.raises(ValueError, match=r"weight is .* the dtype of grad"):
        reduce_rows(index, weight.double(), index, grad, backend=backend)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 5), max_size=40) | st.lists(st.integers(0, 1), min_size=20, max_size=60),
    piece_entries=st.integers(1, 9),
)
def test_segments_hold_each_entry_once_and_in_order(rows: list[int], piece_entries: int) -> None:
    segments = sort_segments(torch.tensor(rows, dtype=torch.int32), piece_entries)
    order, bounds, first_piece = segments.order.tolist(), segments.bounds.tolist(), segments.first_piece.tolist()
    pieces = list(zip(*segments.pieces.tolist(), strict=True))
    assert segments.rows.tolist() == sorted(set(rows))
    assert bounds[0] == 0 and bounds[-1] == len(rows)
    used = 0
    for number, row in enumerate(segments.rows.tolist()):
        start, end = bounds[number], bounds[number + 1]
        assert order[start:end] == [entry for entry, each in enumerate(rows) if each == row]
        if end - start > piece_entries:
            own = pieces[first_piece[number] : first_piece[number + 1]]
            used += len(own)
            assert own[0][0] == start and own[-1][1] == end
            assert all(0 < last - first <= piece_entries for first, last in own)
            assert [last for _, last in own[:-1]] == [first for first, _ in own[1:]]
            assert segments.piece_row[first_piece[number] : first_piece[number + 1]].tolist() == [number] * len(own)
    # What was made in excess is empty.
    assert all(first == last for first, last in pieces[used:])
    assert len(pieces) <= 2 * len(rows) / piece_entries
