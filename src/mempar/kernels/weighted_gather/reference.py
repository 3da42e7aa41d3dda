"""The definition of `weighted_gather`, one line an output, for tests."""

import itertools

import torch
from torch import Tensor


def weighted_gather(values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`[B, D']` weighted sums; materialises the rows `[E, D']`."""
    rows = values[row_index.long()] * weight[:, None]
    bounds = offsets.tolist()
    return torch.stack([rows[start:end].sum(0) for start, end in itertools.pairwise(bounds)])


def gather_scores(values: Tensor, row_index: Tensor, bag_index: Tensor, grad: Tensor) -> Tensor:
    """`[E]` products of each entry's row with the gradient of its bag."""
    return (values[row_index.long()] * grad[bag_index.long()]).sum(-1)
