"""Launches of `weighted_gather` and `gather_scores` that are compiled for GPUs."""

import torch
from torch import Tensor

from compiled import Case
from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import gather_scores, weighted_gather

TRITON = Backend(name="triton")


def _bags(width: int, dtype: torch.dtype, index_dtype: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    index = torch.zeros(16, dtype=index_dtype)
    return torch.zeros(8, width, dtype=dtype), index, torch.zeros(16, dtype=dtype), torch.zeros(3, dtype=index_dtype)


def gather(width: int, dtype: torch.dtype, index_dtype: torch.dtype = torch.int32, *, gated: bool = False) -> object:
    """Two bags of eight."""
    gate = torch.zeros(2, width, dtype=dtype) if gated else None
    return weighted_gather(*_bags(width, dtype, index_dtype), backend=TRITON, gate=gate)


def scores(width: int, dtype: torch.dtype) -> object:
    """Sixteen entries."""
    values, index, _, _ = _bags(width, dtype)
    return gather_scores(values, index, index, torch.zeros(2, width, dtype=dtype), backend=TRITON)


BF16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
CASES = {
    "gather-4096-bf16": Case(lambda: gather(4096, BF16), registers=64, vector_loads=4),
    "gather-4096-bf16-gated": Case(lambda: gather(4096, BF16, gated=True), registers=64, vector_loads=4),
    "gather-2048-bf16-int64": Case(lambda: gather(2048, BF16, torch.int64), registers=64, vector_loads=4),
    "gather-768-float32": Case(lambda: gather(768, FLOAT32), registers=64, vector_loads=4),
    "gather-64-bf16": Case(lambda: gather(64, BF16), registers=64, vector_loads=2),
    # Rows that do not start on 16 bytes are read number by number.
    "gather-33-float64": Case(lambda: gather(33, FLOAT64), registers=128, vector_loads=0),
    "scores-4096-bf16": Case(lambda: scores(4096, BF16), registers=96, vector_loads=8),
    "scores-768-float32": Case(lambda: scores(768, FLOAT32), registers=96, vector_loads=8),
    "scores-33-float64": Case(lambda: scores(33, FLOAT64), registers=168, vector_loads=0),
}
