"""Sums over experts of one neuron, `w gelu(u . x) v`, from two tables at once, and their gradients.

PEER ("Mixture of A Million Experts", arXiv 2407.04153): a slot is an expert, its row `u` of the table `down` looks at
the input and its row `v` of the table `values` is what it says. Both tables have to lie here whole: where columns are
cut, `u . x` is a sum over ranks, and the two halves have an exchange between them (`dot` and `read` of the readers).
The gradients of the rows are not made here: what they consist of is, see `PeerGrads`. gelu is the exact one (erf).
"""

import torch
from torch import Tensor

from mempar.kernels.checks import check_device, check_index, check_offsets, check_rows, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.peer import native
from mempar.kernels.peer.native import PeerGrads

__all__ = ["PeerGrads", "peer", "peer_backward"]


def peer(
    down: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, x: Tensor, *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Ask the experts of every bag: `out[b] = sum of weight[e] * gelu(down[row] . x[b]) * values[row]`.

    Args:
        down: `[S, D]`; rows may lie any distance apart.
        values: `[S, D]`, likewise, the dtype of `down`.
        row_index: `[E] int32 or int64`, entries of a bag together.
        weight: `[E]`, the dtype of the tables or float32, whichever is wider.
        offsets: `[B + 1]`, the dtype of `row_index`; bag b is `[offsets[b], offsets[b + 1])`.
        x: `[B, D]`, the dtype of the tables.
        backend: what computes it.

    Returns:
        The sums `[B, D]`, in the dtype of the tables, and the products `down[row] . x[b]` `[E]`, in that of `weight`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row is out of range; looked for if the backend checks indices.
    """
    _check(down, values, row_index, weight, offsets, backend)
    _check_bags("x", x, offsets, values)
    row_index, weight, offsets = row_index.contiguous(), weight.contiguous(), offsets.contiguous()
    if backend.is_triton:
        from mempar.kernels.peer import fused

        return fused.peer(down, values, row_index, weight, offsets, x)
    return native.peer(down, values, row_index, weight, offsets, x)


def peer_backward(
    down: Tensor,
    values: Tensor,
    row_index: Tensor,
    weight: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    grad: Tensor,
    *,
    backend: Backend,
) -> PeerGrads:
    """Gradients of `peer`.

    Args:
        down: as given to `peer`.
        values: as given to `peer`.
        row_index: as given to `peer`.
        weight: as given to `peer`.
        offsets: as given to `peer`.
        hidden: `[E]`, the products that `peer` returned.
        grad: `[B, D]`, gradient of the sums, the dtype of the tables.
        backend: what computes it.

    Returns:
        See `PeerGrads`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: a row is out of range; looked for if the backend checks indices.
    """
    _check(down, values, row_index, weight, offsets, backend)
    _check_bags("grad", grad, offsets, values)
    require(hidden.shape == weight.shape and hidden.dtype == weight.dtype, "hidden", hidden, "what weight has")
    check_device(values.device, hidden=hidden)
    row_index, weight, offsets = row_index.contiguous(), weight.contiguous(), offsets.contiguous()
    hidden = hidden.contiguous()
    if backend.is_triton:
        from mempar.kernels.peer import fused

        return fused.peer_backward(down, values, row_index, weight, offsets, hidden, grad)
    return native.peer_backward(down, values, row_index, weight, offsets, hidden, grad)


def _check(down: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, backend: Backend) -> None:
    check_rows("down", down)
    check_rows("values", values)
    fits = down.shape == values.shape and down.dtype == values.dtype
    require(fits, "down", down, f"the shape and dtype of values, {list(values.shape)} {values.dtype}")
    check_index("row_index", row_index, values, backend)
    wide = torch.promote_types(values.dtype, torch.float32)
    fits = weight.shape == row_index.shape and weight.dtype == wide
    require(fits, "weight", weight, f"a number of {wide} for each of {row_index.numel()} entries")
    check_offsets(offsets, row_index, backend)
    check_device(values.device, down=down, weight=weight)


def _check_bags(name: str, vectors: Tensor, offsets: Tensor, values: Tensor) -> None:
    check_rows(name, vectors)
    check_device(values.device, **{name: vectors})
    shape = [offsets.numel() - 1, values.shape[1]]
    fits = list(vectors.shape) == shape and vectors.dtype == values.dtype
    require(fits, name, vectors, f"shape {shape} and the dtype of values, {values.dtype}")
