"""Gradients of table rows: entries that hit the same row are summed, and only touched rows exist.

The sum is in entry order (the sort is stable), so the result does not vary from run to run.
"""

import torch
from torch import Tensor

from mempar.kernels.weighted_gather import weighted_gather


def reduce_rows(row_index: Tensor, weight: Tensor, bag_index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sum `weight[e] * grad[bag_index[e]]` over the entries of each distinct row.

    Args:
        row_index: `[E] int32 or int64`.
        weight: `[E]`, the dtype of `grad`.
        bag_index: `[E] int32 or int64`, rows of `grad`.
        grad: `[B, D']`.

    Returns:
        `rows [U]`, ascending, and their sums `[U, D']`.
    """
    sorted_row, order = torch.sort(row_index, stable=True)
    rows, count = torch.unique_consecutive(sorted_row, return_counts=True)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(count, 0, out=offsets[1:])
    return rows, weighted_gather(grad, bag_index[order].long(), weight[order], offsets)
