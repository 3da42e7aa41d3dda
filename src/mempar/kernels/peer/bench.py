"""Contests of `peer`: a million experts of one neuron asked, and differentiated."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.peer import peer, peer_backward
from mempar.kernels.weighted_gather import native


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the sums over experts and their gradients, beside two reads with gelu between them.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: of both tables, at most.
    """
    num_rows, entries = shape.rows_within(table_bytes // 2), shape.tokens * shape.reads
    down, values = (
        torch.empty(num_rows, shape.width, dtype=shape.dtype, device=device).normal_(std=shape.width**-0.5)
        for _ in range(2)
    )
    x, grad = (torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype) for _ in range(2))
    row_index = torch.randint(num_rows, (entries,), dtype=torch.int32, device=device)
    weight = torch.rand(entries, device=device)
    offsets = torch.arange(0, entries + 1, shape.reads, dtype=torch.int32, device=device)
    bags = torch.arange(shape.tokens, dtype=torch.int32, device=device).repeat_interleave(shape.reads)
    rows_bytes, bags_bytes = entries * shape.width * shape.value_bytes, shape.tokens * shape.width * shape.value_bytes

    def two_reads() -> Tensor:
        hidden = native.gather_scores(down, row_index, bags, x)
        expert_weight = (weight * F.gelu(hidden.float())).to(shape.dtype)
        return native.weighted_gather(values, row_index, expert_weight, offsets)

    yield Contest(
        name="peer",
        ours=lambda: peer(down, values, row_index, weight, offsets, x, backend=backend)[0],
        truth=two_reads,
        rivals={"torch, two reads": two_reads},
        num_bytes=2 * rows_bytes + 2 * bags_bytes + 12 * entries,
        # The other way rounds the experts' weights to the table's dtype.
        tolerance=2 * torch.finfo(shape.dtype).eps * shape.reads**0.5,
        inputs={"down": down, "values": values, "row_index": row_index, "weight": weight, "offsets": offsets, "x": x},
    )
    _, hidden = peer(down, values, row_index, weight, offsets, x, backend=backend)
    given = (down, values, row_index, weight, offsets, hidden, grad)
    torch_way = {"torch": lambda: peer_backward(*given, backend=TORCH)}
    yield Contest(
        name="peer, backward",
        ours=lambda: peer_backward(*given, backend=backend),
        rivals=torch_way if backend.is_triton else {},
        num_bytes=2 * rows_bytes + 2 * bags_bytes + 24 * entries,
    )
