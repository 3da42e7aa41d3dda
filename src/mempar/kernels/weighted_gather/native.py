"""`weighted_gather` and `gather_scores` of torch's own operators: what runs on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_gather(values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sum the weighted rows of every bag; see the public operation."""
    num_bags = offsets.numel() - 1
    if num_bags == 0 or row_index.numel() == 0:
        return values.new_zeros(num_bags, values.shape[1])
    with torch.no_grad():
        return F.embedding_bag(
            row_index, values, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        )


def gather_scores(values: Tensor, row_index: Tensor, bag_index: Tensor, grad: Tensor) -> Tensor:
    """Multiply each entry's row with the gradient of its bag; see the public operation."""
    if row_index.numel() == 0:
        return values.new_zeros(0)
    if values.is_cuda:
        # There the operator knows no bf16, and counts threads in 32 bits: 2^26 entries at most.
        return scores_in_chunks(values, row_index, bag_index, grad)
    # The operator does not look at the starts of the bags where it is given the bag of each entry.
    starts = row_index[:0]
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, values, row_index, starts, bag_index, 0)


def scores_in_chunks(
    values: Tensor, row_index: Tensor, bag_index: Tensor, grad: Tensor, *, chunk_elements: int = 1 << 24
) -> Tensor:
    """Compute what `gather_scores` does, from so many elements of rows at a time; sums are in float32 at least.

    Args:
        values: `[S', D']`.
        row_index: `[E]`.
        bag_index: `[E]`, rows of `grad`.
        grad: `[B, D']`.
        chunk_elements: elements of rows that are held at once.

    Returns:
        `[E]`, the dtype of `values`.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    out = values.new_empty(row_index.numel())
    at_once = max(1, chunk_elements // values.shape[1])
    for part, rows, bags in zip(out.split(at_once), row_index.split(at_once), bag_index.split(at_once), strict=True):
        part.copy_(values.index_select(0, rows).to(wide).mul_(grad.index_select(0, bags)).sum(-1))
    return out
