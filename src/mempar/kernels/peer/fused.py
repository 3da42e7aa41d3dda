"""Triton kernels of `peer` and of its gradients.

A program takes one bag: its vector and the sum that it makes stay in registers, and each entry's two rows are read
once, ROWS entries at a time. The second row is asked for before the first one's product is known, so that both are
under way together. Backward is the same walk with the tables changing places: rows of `values` are multiplied with the
output gradient, rows of `down` are summed. Arithmetic is in float32 (float64 for float64 tables), results are rounded
once. No program writes what another one writes and nothing is atomic: results do not vary from run to run. Addresses
are computed in 64 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.checks import require
from mempar.kernels.peer.native import PeerGrads
from mempar.kernels.weighted_gather.fused import wide_type

# Bytes of each table's rows that a thread has under way: 4 loads of 16 bytes.
_THREAD_BYTES = 4 * 16
# Most entries at a time.
_ENTRIES = 32
# Most columns, 32 a thread of 16 warps: beyond it the vector and the sum of a bag do not fit in registers.
_MOST_COLUMNS = 16384


@triton.jit
def _normal_share(hidden, WIDE: tl.constexpr):
    """Share of a normal distribution below each number; constants are written in the type of the arithmetic."""
    return 0.5 * (1 + tl.erf(hidden * tl.full([], 0.7071067811865476, WIDE)))


@triton.jit
def forward_kernel(
    out_ptr,
    hidden_ptr,
    down_ptr,
    values_ptr,
    row_ptr,
    weight_ptr,
    offset_ptr,
    x_ptr,
    num_columns,
    down_stride,
    values_stride,
    x_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One bag: products with its input, their activation, the weighted sum."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    x = tl.load(x_ptr + bag * x_stride + column, mask=inside, other=0).to(WIDE)
    start = tl.load(offset_ptr + bag).to(tl.int64)
    end = tl.load(offset_ptr + bag + 1).to(tl.int64)
    total = tl.zeros([COLUMNS], WIDE)
    for first in tl.range(start, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        live = entry < end
        both = live[:, None] & inside[None, :]
        row = tl.load(row_ptr + entry, mask=live, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + entry, mask=live, other=0).to(WIDE)
        down = tl.load(down_ptr + (row * down_stride)[:, None] + column[None, :], mask=both, other=0)
        value = tl.load(values_ptr + (row * values_stride)[:, None] + column[None, :], mask=both, other=0)
        hidden = tl.sum(down.to(WIDE) * x[None, :], 1)
        tl.store(hidden_ptr + entry, hidden.to(hidden_ptr.dtype.element_ty), mask=live)
        strength = weight * hidden * _normal_share(hidden, WIDE)
        total += tl.sum(value.to(WIDE) * strength[:, None], 0)
    tl.store(out_ptr + bag * num_columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x_grad_ptr,
    weight_grad_ptr,
    value_weight_ptr,
    down_weight_ptr,
    down_ptr,
    values_ptr,
    row_ptr,
    weight_ptr,
    offset_ptr,
    hidden_ptr,
    grad_ptr,
    num_columns,
    down_stride,
    values_stride,
    grad_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One bag: products with its gradient, the gradients of its entries, the weighted sum of input rows."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    grad = tl.load(grad_ptr + bag * grad_stride + column, mask=inside, other=0).to(WIDE)
    start = tl.load(offset_ptr + bag).to(tl.int64)
    end = tl.load(offset_ptr + bag + 1).to(tl.int64)
    total = tl.zeros([COLUMNS], WIDE)
    for first in tl.range(start, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        live = entry < end
        both = live[:, None] & inside[None, :]
        row = tl.load(row_ptr + entry, mask=live, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + entry, mask=live, other=0).to(WIDE)
        hidden = tl.load(hidden_ptr + entry, mask=live, other=0).to(WIDE)
        value = tl.load(values_ptr + (row * values_stride)[:, None] + column[None, :], mask=both, other=0)
        down = tl.load(down_ptr + (row * down_stride)[:, None] + column[None, :], mask=both, other=0)
        share = _normal_share(hidden, WIDE)
        density = tl.exp(-0.5 * hidden * hidden) * tl.full([], 0.3989422804014327, WIDE)
        score = tl.sum(value.to(WIDE) * grad[None, :], 1)
        down_weight = weight * score * (share + hidden * density)
        tl.store(weight_grad_ptr + entry, (hidden * share * score).to(weight_grad_ptr.dtype.element_ty), mask=live)
        value_weight = weight * hidden * share
        tl.store(value_weight_ptr + entry, value_weight.to(value_weight_ptr.dtype.element_ty), mask=live)
        tl.store(down_weight_ptr + entry, down_weight.to(down_weight_ptr.dtype.element_ty), mask=live)
        total += tl.sum(down.to(WIDE) * down_weight[:, None], 0)
    tl.store(x_grad_ptr + bag * num_columns + column, total.to(x_grad_ptr.dtype.element_ty), mask=inside)


def peer(
    down: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Ask the experts of every bag; see the public operation."""
    out, hidden = values.new_empty(x.shape), torch.empty_like(weight)
    if out.numel():
        forward_kernel[(len(out),)](
            out,
            hidden,
            down,
            values,
            row_index,
            weight,
            offsets,
            x,
            values.shape[1],
            down.stride(0),
            values.stride(0),
            x.stride(0),
            **_tile(values),
        )
    return out, hidden


def peer_backward(
    down: Tensor,
    values: Tensor,
    row_index: Tensor,
    weight: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    grad: Tensor,
) -> PeerGrads:
    """Gradients of `peer`; see the public operation."""
    value_weight, down_weight = (torch.empty_like(weight, dtype=values.dtype) for _ in range(2))
    grads = PeerGrads(values.new_empty(grad.shape), torch.empty_like(weight), value_weight, down_weight)
    if grads.x.numel():
        backward_kernel[(len(grad),)](
            grads.x,
            grads.weight,
            value_weight,
            down_weight,
            down,
            values,
            row_index,
            weight,
            offsets,
            hidden,
            grad,
            values.shape[1],
            down.stride(0),
            values.stride(0),
            grad.stride(0),
            **_tile(values),
        )
    return grads


def _tile(values: Tensor) -> dict[str, object]:
    """Rows and columns, powers of two, of the tiles in which a table is read, and the warps that hold them."""
    width = values.shape[1]
    require(width <= _MOST_COLUMNS, "values", values, f"at most {_MOST_COLUMNS} columns")
    columns = triton.next_power_of_2(width)
    # 16 columns of the vector and of the sum a thread, where warps suffice.
    num_warps = min(16, max(4, columns // (16 * 32)))
    rows = num_warps * 32 * _THREAD_BYTES // (columns * values.element_size())
    return {
        "WIDE": wide_type(values.dtype),
        "ROWS": max(1, min(_ENTRIES, rows)),
        "COLUMNS": columns,
        "num_warps": num_warps,
    }
