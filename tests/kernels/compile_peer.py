"""Launches of `peer` and of its gradients that are compiled for GPUs."""

import torch

from compiled import Case
from mempar.kernels.dispatch import Backend
from mempar.kernels.peer import peer, peer_backward

TRITON = Backend(name="triton")
BF16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64


def experts(width: int, dtype: torch.dtype) -> None:
    """Two bags of eight, forward and backward."""
    table, x = torch.zeros(8, width, dtype=dtype), torch.zeros(2, width, dtype=dtype)
    index, weight = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.promote_types(dtype, FLOAT32))
    peer(table, table, index, weight, index[:3], x, backend=TRITON)
    peer_backward(table, table, index, weight, index[:3], weight, x, backend=TRITON)


CASES = {
    "peer-768-bf16": Case(lambda: experts(768, BF16), registers=112, vector_loads=8),
    "peer-768-float32": Case(lambda: experts(768, FLOAT32), registers=112, vector_loads=8),
    "peer-2048-bf16": Case(lambda: experts(2048, BF16), registers=112, vector_loads=8),
    "peer-4096-bf16": Case(lambda: experts(4096, BF16), registers=112, vector_loads=8),
    # Rows that do not start on 16 bytes are read number by number.
    "peer-33-float64": Case(lambda: experts(33, FLOAT64), registers=224, vector_loads=0),
}
