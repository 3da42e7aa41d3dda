"""Bags of entries at awkward sizes, and how far a sum of rounded terms may be off."""

import pytest
import torch
from torch import Tensor

NUM_ROWS = 11
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
# Entries in each bag; they hit any row, or those of HIT_ROWS.
BAGS = {
    "one_token": [6],
    "one_entry": [1],
    "uneven": [3, 7, 1, 20, 4],
    "empty_bags": [0, 3, 0, 0, 5, 0],
    "no_entries": [0, 0, 0],
    "duplicates": [8, 9, 10],
    "one_row": [5, 0, 17],
}
HIT_ROWS = {"duplicates": [4, 9, 10], "one_row": [10]}


def make_bags(case: str, width: int, dtype: torch.dtype, index_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """values [S, D], NaN where no entry looks, row_index [E], weight [E], offsets [B + 1], grad [B, D]."""
    sizes, choice = BAGS[case], torch.tensor(HIT_ROWS.get(case, range(NUM_ROWS)), dtype=index_dtype)
    row_index = choice[torch.randint(len(choice), (sum(sizes),))]
    offsets = torch.tensor([0, *sizes], dtype=index_dtype).cumsum(0, dtype=index_dtype)
    values = torch.full((NUM_ROWS, width), torch.nan, dtype=dtype)
    values[row_index.long()] = torch.randn(NUM_ROWS, width).to(dtype)[row_index.long()]
    weight, grad = torch.randn(sum(sizes)).to(dtype), torch.randn(len(sizes), width).to(dtype)
    return values, row_index, weight, offsets, grad


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, num_terms: int) -> None:
    """A sum of n rounded terms errs by n eps of their magnitudes at most, in float32 for bf16, and is rounded once."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    bound = (num_terms + 2) * wide.eps * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert bool((error <= bound).all()), f"largest error {error.max()}"


every_case = pytest.mark.parametrize("case", BAGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_index_dtype = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
WIDTHS = (1, 7, 33, 100)
