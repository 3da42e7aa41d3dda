"""Queries, keys and sizes for tests of `product_topk`."""

import pytest
import torch
from torch import Tensor

FLOAT64, FLOAT32, BF16 = torch.float64, torch.float32, torch.bfloat16
EPSILON = 1e-5


def normal_halves(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, dtype: torch.dtype = FLOAT64
) -> tuple[Tensor, Tensor]:
    """Query [T, H, 2, Q] and keys [H, 2, N, Q]; in float64 rounding makes no ties."""
    query = torch.randn(num_tokens, num_heads, 2, width, dtype=FLOAT64)
    return query.to(dtype), torch.randn(num_heads, 2, num_subkeys, width, dtype=FLOAT64).to(dtype)


topk_shapes = pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_subkeys", "width", "top_k"),
    [(1, 1, 1, 1, 1), (1, 3, 7, 5, 4), (5, 2, 9, 3, 9), (17, 2, 13, 6, 1), (3, 1, 12, 33, 12), (2, 2, 40, 2, 32)],
)
# Lists of sub-keys that are read whole and by groups, and are no multiple of a group; tokens and widths of more than
# one tile; K no power of two.
kernel_shapes = pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_subkeys", "width", "top_k"),
    [(3, 2, 1, 1, 1), (1, 2, 37, 5, 5), (2, 1, 300, 70, 7), (70, 1, 40, 19, 2), (1, 1, 523, 16, 32), (1, 1, 70, 3, 64)],
)
# The operands' dtype and that of the scores.
precisions = pytest.mark.parametrize(
    ("dtype", "score_dtype"),
    [(FLOAT32, FLOAT32), (BF16, FLOAT32), (BF16, BF16), (FLOAT32, BF16)],
    ids=["float32", "float32-of-bf16", "bf16", "bf16-of-float32"],
)
normalisation = pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
