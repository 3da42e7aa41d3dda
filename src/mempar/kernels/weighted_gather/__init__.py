"""Weighted sums of table rows, bag by bag, and the gradient of the weights.

A bag is the entries of one token: `out[b] = sum over e in bag b of weight[e] * values[row_index[e]]`.
The same operation reads the value table forward, reduces deposited gradients by row, and turns
sparse score gradients into query gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.kernels.checks import check_device, check_index, check_offsets, check_rows, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import native


def weighted_gather(
    values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, *, backend: Backend, gate: Tensor | None = None
) -> Tensor:
    """Sum the weighted rows of every bag, without ever holding the rows `[E, D]`.

    Args:
        values: `[S', D']` rows of one shard; rows may lie any distance apart.
        row_index: `[E] int32 or int64`, rows of this shard, entries of a bag together.
        weight: `[E]`, the dtype of `values`.
        offsets: `[B + 1]`, the dtype of `row_index`; bag b is `[offsets[b], offsets[b + 1])`.
        backend: what computes it.
        gate: `[B, D']`: the sums are multiplied by silu(gate).

    Returns:
        `[B, D']`; the row of an empty bag is zero.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row is out of range; looked for if the backend checks indices.
    """
    check_rows("values", values)
    check_index("row_index", row_index, values, backend)
    require(weight.shape == row_index.shape, "weight", weight, f"a number for each of {row_index.numel()} entries")
    require(weight.dtype == values.dtype, "weight", weight, f"the dtype of values, {values.dtype}")
    check_offsets(offsets, row_index, backend)
    check_device(values.device, weight=weight, gate=gate)
    num_bags = offsets.numel() - 1
    if gate is not None:
        require(gate.shape == (num_bags, values.shape[1]), "gate", gate, f"shape {[num_bags, values.shape[1]]}")
        check_rows("gate", gate)
    row_index, weight, offsets = row_index.contiguous(), weight.contiguous(), offsets.contiguous()
    if backend.is_triton:
        from mempar.kernels.weighted_gather import fused

        return fused.gather_into(values.new_empty(num_bags, values.shape[1]), values, row_index, weight, offsets, gate)
    sums = native.weighted_gather(values, row_index, weight, offsets)
    return sums if gate is None else sums.mul_(F.silu(gate))


def gather_scores(values: Tensor, row_index: Tensor, bag_index: Tensor, grad: Tensor, *, backend: Backend) -> Tensor:
    """Gradient of the weights: `out[e] = values[row_index[e]] . grad[bag of e]`.

    Args:
        values: `[S', D']` rows of one shard; rows may lie any distance apart.
        row_index: `[E] int32 or int64`.
        bag_index: `[E]`, rows of `grad`, the dtype of `row_index`; see `bag_of_entries`.
        grad: `[B, D']`, gradient of the bags' sums, the dtype of `values`.
        backend: what computes it.

    Returns:
        `[E]`, the dtype of `values`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row or bag is out of range; looked for if the backend checks indices.
    """
    check_rows("values", values)
    check_rows("grad", grad)
    require(grad.shape[1] == values.shape[1], "grad", grad, f"as many columns as values, {values.shape[1]}")
    require(grad.dtype == values.dtype, "grad", grad, f"the dtype of values, {values.dtype}")
    check_index("row_index", row_index, values, backend)
    check_device(values.device, grad=grad)
    check_index("bag_index", bag_index, grad, backend)
    require(bag_index.dtype == row_index.dtype, "bag_index", bag_index, f"the dtype of row_index, {row_index.dtype}")
    require(bag_index.shape == row_index.shape, "bag_index", bag_index, "a bag for each entry")
    row_index, bag_index = row_index.contiguous(), bag_index.contiguous()
    if backend.is_triton:
        from mempar.kernels.weighted_gather import fused

        return fused.scores_into(values.new_empty(row_index.numel()), values, row_index, bag_index, grad)
    return native.gather_scores(values, row_index, bag_index, grad)


def bag_of_entries(offsets: Tensor, num_entries: int) -> Tensor:
    """Return `[E]`, the bag that each of E entries belongs to, from `offsets [B + 1]`; the host does not wait."""
    bags = torch.arange(offsets.numel() - 1, dtype=offsets.dtype, device=offsets.device)
    return torch.repeat_interleave(bags, offsets[1:] - offsets[:-1], output_size=num_entries)
