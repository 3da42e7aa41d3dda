"""Launches of `product_topk` that are compiled for GPUs."""

import torch

from compiled import Case
from mempar.kernels.dispatch import Backend
from mempar.kernels.product_topk import product_topk

TRITON = Backend(name="triton")
BF16, FLOAT32 = torch.bfloat16, torch.float32


def topk(
    num_subkeys: int,
    half_key_dim: int,
    top_k: int,
    dtype: torch.dtype,
    score_dtype: torch.dtype,
    *,
    normalised: bool = False,
    replayed: bool = False,
) -> object:
    """Two tokens and heads, forward and backward."""
    query = torch.zeros(2, 2, 2, half_key_dim, dtype=dtype, requires_grad=True)
    keys = torch.zeros(2, 2, num_subkeys, half_key_dim, dtype=dtype, requires_grad=True)
    norm = torch.ones(half_key_dim, dtype=dtype) if normalised else None
    slot_index = torch.zeros(2, 2, top_k, dtype=torch.int64) if replayed else None
    _, weight = product_topk(
        query, keys, top_k, slot_index, backend=TRITON, score_dtype=score_dtype, query_norm=norm, key_norm=norm
    )
    weight.sum().backward()
    return weight


# The recipes' shapes: Q is a quarter of the model's width.
CASES = {
    "topk-134m-bf16": Case(lambda: topk(1024, 192, 32, BF16, BF16), registers=184, vector_loads=4),
    "topk-1.3b-bf16-normalised": Case(
        lambda: topk(1024, 512, 32, BF16, BF16, normalised=True), registers=184, vector_loads=4
    ),
    "topk-8b-bf16": Case(lambda: topk(4096, 1024, 32, BF16, BF16), registers=184, vector_loads=4),
    "topk-8b-float32-of-bf16": Case(lambda: topk(4096, 1024, 32, BF16, FLOAT32), registers=232, vector_loads=4),
    "topk-8192-keys-bf16": Case(lambda: topk(8192, 512, 64, BF16, BF16), registers=184, vector_loads=4),
    "topk-8192-keys-float32": Case(lambda: topk(8192, 512, 64, FLOAT32, FLOAT32), registers=184, vector_loads=4),
    # Rows that do not start on 16 bytes are read number by number; few sub-keys make no groups.
    "topk-odd-float32": Case(lambda: topk(37, 33, 5, FLOAT32, FLOAT32), registers=232, vector_loads=0),
    "topk-replayed-float32": Case(
        lambda: topk(37, 33, 5, FLOAT32, FLOAT32, replayed=True), registers=232, vector_loads=0
    ),
}
