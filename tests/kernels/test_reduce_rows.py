"""Sums of the entries of each row, against their reference."""

import pytest
import torch

from bags import WIDTHS, assert_near, every_case, every_dtype, every_index_dtype, make_bags
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.reduce_rows import reference as reduce_reference
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
