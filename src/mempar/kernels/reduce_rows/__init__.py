"""Gradients of table rows: entries that hit the same row are summed, and only touched rows exist.

The sum is in entry order (the sort is stable), so the result does not vary from run to run. Triton's kernels cut rows
of many entries in pieces that are summed side by side (segments.py), and add the pieces' sums in order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mempar.kernels.blocking import block_columns
from mempar.kernels.checks import check_device, check_ids, check_rows, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import weighted_gather


def reduce_rows(
    row_index: Tensor, weight: Tensor, bag_index: Tensor, grad: Tensor, *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Sum `weight[e] * grad[bag_index[e]]` over the entries of each distinct row.

    Args:
        row_index: `[E] int32 or int64`.
        weight: `[E]`, the dtype of `grad`.
        bag_index: `[E] int32 or int64`, rows of `grad`.
        grad: `[B, D']`.
        backend: what computes it.

    Returns:
        `rows [U]`, ascending, and their sums `[U, D']`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a bag is out of range; looked for if the backend checks indices.
    """
    check_entries(row_index, weight, bag_index, [grad], backend)
    require(weight.dtype == grad.dtype, "weight", weight, f"the dtype of grad, {grad.dtype}")
    if backend.is_triton:
        return _fused(row_index, weight, bag_index, [grad])
    rows, order, offsets = _sort_entries(row_index)
    return rows, weighted_gather(grad, bag_index[order].long(), weight[order], offsets, backend=backend)


def reduce_row_parts(
    row_index: Tensor, weight: Tensor, bag_index: Tensor, grads: Sequence[Tensor], *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Do the same with a gradient that comes in parts, without ever holding the parts joined.

    Triton's kernels read them where they lie; otherwise they are joined, in the dtype of `weight`, for a block of
    columns at a time.

    Args:
        row_index: `[E] int32 or int64`.
        weight: `[E]`, the dtype of the result.
        bag_index: `[E] int32 or int64`, rows of all parts one after the other.
        grads: `[B_i, D']` each, one at least; of the dtype of `weight` and one more.
        backend: what computes it.

    Returns:
        `rows [U]`, ascending, and their sums `[U, D']`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a bag is out of range; looked for if the backend checks indices.
    """
    check_entries(row_index, weight, bag_index, grads, backend)
    if backend.is_triton:
        return _fused(row_index, weight, bag_index, grads)
    rows, order, offsets = _sort_entries(row_index)
    bags, weight = bag_index[order].long(), weight[order]
    # Not needed while the sums are made, when memory is at its peak.
    del order
    width = grads[0].shape[1]
    sums = weight.new_empty(len(rows), width)
    num_bags = sum(map(len, grads))
    at_once = block_columns(num_bags, len(rows))
    for start in range(0, width, at_once):
        columns = slice(start, min(start + at_once, width))
        # Nothing keeps a block when the next is made.
        sums[:, columns] = weighted_gather(
            _joined(grads, columns, num_bags, weight), bags, weight, offsets, backend=backend
        )
    return rows, sums


def check_entries(
    row_index: Tensor, weight: Tensor, bag_index: Tensor, grads: Sequence[Tensor], backend: Backend
) -> None:
    """Require entries `[E]` of a gradient in parts `[B_i, D']` that can be summed in the dtype of their weights.

    That bags are in range is looked at if the backend checks indices; rows are for the caller to look at.
    """
    if not grads:
        raise ValueError("there is no gradient; it must have one part at least.")
    narrow = next((grad.dtype for grad in grads if grad.dtype != weight.dtype), weight.dtype)
    for grad in grads:
        check_rows("grad", grad)
        check_device(weight.device, grad=grad)
        require(grad.shape[1] == grads[0].shape[1], "grad", grad, f"{grads[0].shape[1]} columns, as the first part has")
        require(grad.dtype in (weight.dtype, narrow), "grad", grad, f"the dtype {weight.dtype} or {narrow}")
    fits = row_index.dim() == 1 and row_index.dtype in (torch.int32, torch.int64)
    require(fits, "row_index", row_index, "one dimension of int32 or int64")
    check_device(row_index.device, weight=weight, bag_index=bag_index)
    require(bag_index.shape == row_index.shape, "bag_index", bag_index, f"a bag for each of {len(row_index)} entries")
    require(weight.shape == row_index.shape, "weight", weight, f"a number for each of {len(row_index)} entries")
    check_ids("bag_index", bag_index, sum(map(len, grads)), backend)


def _fused(row_index: Tensor, weight: Tensor, bag_index: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from mempar.kernels.reduce_rows import fused, segments

    entries = segments.locate_entries(row_index, weight, bag_index, grads)
    return entries.segments.rows, fused.sum_rows(entries)


def _joined(grads: Sequence[Tensor], columns: slice, num_bags: int, like: Tensor) -> Tensor:
    """Join the parts' columns in the dtype of `like`; torch.cat would hold converted copies of all parts beside."""
    joined = like.new_empty(num_bags, columns.stop - columns.start)
    for part, grad in zip(joined.split([len(grad) for grad in grads]), grads, strict=True):
        part.copy_(grad[:, columns])
    return joined


def _sort_entries(row_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct rows `[U]`, the entries in row order `[E]`, and the rows' bounds among them `[U + 1]`."""
    sorted_row, order = torch.sort(row_index, stable=True)
    rows, count = torch.unique_consecutive(sorted_row, return_counts=True)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(count, 0, out=offsets[1:])
    return rows, order, offsets
