"""Summing the row gradients of ranks that hold the same shard: replicas and copies on other stages.

Only touched rows travel. Every rank gathers all members' (row, gradient) pairs and sums them in
member order, never its own first, so that all copies apply bit for bit the same update.
"""

import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import reduce_rows
from mempar.parallel.collectives import MemberGroup


def sum_over_copies(rows: Tensor, grad: Tensor, group: MemberGroup, *, backend: Backend) -> tuple[Tensor, Tensor]:
    """Sum touched-row gradients over the holders of one shard. All of them must call it, empty or not.

    Args:
        rows: `[U] int32`, distinct rows touched on this rank.
        grad: `[U, D_j]`.
        group: replicas and stage copies of this shard.
        backend: what sums.

    Returns:
        The union of the members' rows, ascending, and the summed gradients. Each rank sends
        `8(G - 1) + (G - 1) U (4 + g D_j)` bytes for a group of G, g bytes an element; the host waits
        for the counts.
    """
    group.marks.note("touched", [len(rows)])
    if group.size == 1:
        return rows, grad
    received = group.exchange_counts([[len(rows)]] * group.size, rows.device, "copy_sync")
    sizes = [size for (size,) in received]
    all_rows = group.share(rows, sizes, "copy_sync")
    all_grads = group.share(grad, sizes, "copy_sync")
    entries = torch.arange(len(all_rows), device=rows.device)
    ones = torch.ones(len(all_rows), dtype=grad.dtype, device=rows.device)
    with group.marks.span("reduce_rows"):
        return reduce_rows(all_rows, ones, entries, all_grads, backend=backend)
