"""The definition of `reduce_rows` through a dense gradient, for tests."""

import torch
from torch import Tensor


def reduce_rows(row_index: Tensor, weight: Tensor, bag_index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[U]` and sums `[U, D']`, through a `[max row + 1, D']` temporary."""
    rows = torch.unique(row_index)
    dense = grad.new_zeros(int(rows.max()) + 1 if len(rows) else 0, grad.shape[1])
    dense.index_add_(0, row_index.long(), weight[:, None] * grad[bag_index.long()])
    return rows, dense[rows.long()]
