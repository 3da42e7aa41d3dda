"""Launches of `reduce_rows` and `reduce_row_parts` that are compiled for GPUs."""

import torch

from compiled import Case
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import reduce_row_parts, reduce_rows
from mempar.kernels.reduce_rows.segments import PIECE_ENTRIES

TRITON = Backend(name="triton")
BF16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
# One row is cut in pieces.
NUM_ENTRIES = PIECE_ENTRIES + 10


def rows(width: int, dtype: torch.dtype) -> object:
    """Entries of one gradient."""
    index = torch.zeros(NUM_ENTRIES, dtype=torch.int32)
    weight, grad = torch.zeros(NUM_ENTRIES, dtype=dtype), torch.zeros(3, width, dtype=dtype)
    return reduce_rows(index, weight, index, grad, backend=TRITON)


def parts(width: int, *dtypes: torch.dtype) -> object:
    """Entries of several, summed in float32."""
    index = torch.zeros(NUM_ENTRIES, dtype=torch.int32)
    grads = [torch.zeros(3, width, dtype=dtype) for dtype in dtypes]
    return reduce_row_parts(index, torch.zeros(NUM_ENTRIES), index, grads, backend=TRITON)


CASES = {
    "reduce-4096-bf16-parts": Case(lambda: parts(4096, BF16, BF16), registers=64, vector_loads=4),
    "reduce-2048-bf16-after-sums": Case(lambda: parts(2048, FLOAT32, BF16, BF16), registers=80, vector_loads=8),
    "reduce-768-bf16-parts": Case(lambda: parts(768, BF16, BF16), registers=64, vector_loads=4),
    "reduce-4096-float32": Case(lambda: rows(4096, FLOAT32), registers=64, vector_loads=4),
    "reduce-33-float64": Case(lambda: rows(33, FLOAT64), registers=128, vector_loads=0),
}
