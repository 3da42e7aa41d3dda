"""Gradients of `product_topk`: sparse in the selected sub-keys, deterministic, and without waiting for the host.

The entries of the K slots of every (token, head, half) are summed twice: by query, where they lie together, and by key,
where a stable sort brings them together. Both sums are weighted gathers; no gradient `[T, H, N]` is made.
"""

import torch
from torch import Tensor

from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import native as gather_native

# Most entries of a sub-key that one program sums.
PIECE_ENTRIES = 512


def score_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """`[T, H, K]` gradient of the scores, through the softmax that made the weights `[T, H, K]`."""
    product = weight * grad
    return product.sub_(weight * product.sum(-1, keepdim=True))


def operand_gradients(
    query: Tensor,
    keys: Tensor,
    slot_index: Tensor,
    score_grad: Tensor,
    inverse_rms: Tensor | None,
    wanted: tuple[bool, bool],
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the operands of the half scores.

    Args:
        query: `[T, H, 2, Q]`.
        keys: `[H, 2, N, Q]`.
        slot_index: `[T, H, K] int64`.
        score_grad: `[T, H, K]`, float32 at least.
        inverse_rms: `[T, H, 2]`, what queries were multiplied by if they were normalised.
        wanted: whether the first and the second gradient are.
        backend: what computes them.

    Returns:
        `[T, H, 2, Q]`, `[H, 2, N, Q]`, in float32 at least if the operand is normalised or wide, else in its dtype.
    """
    num_heads, _, num_subkeys, width = keys.shape
    top_k, num_bags = slot_index.shape[2], query.shape[:3].numel()
    # Bags are the (token, head, half) rows of the queries, rows the (head, half, sub-key) rows of the keys.
    index_dtype = torch.int32 if max(num_bags * top_k, keys.shape[:3].numel()) < 1 << 31 else torch.int64
    halves = torch.stack((slot_index // num_subkeys, slot_index % num_subkeys), 2).to(index_dtype)
    list_start = torch.arange(num_heads * 2, dtype=index_dtype, device=keys.device).view(num_heads, 2, 1)
    row_index = halves.add_(list_start * num_subkeys).view(-1)
    # [T, H, 2, K]: both halves of a slot have the gradient of its score.
    entry_weight = score_grad[:, :, None].expand(-1, -1, 2, -1)
    grad_query = grad_keys = None
    if wanted[0]:
        offsets = torch.arange(0, num_bags * top_k + 1, top_k, dtype=index_dtype, device=keys.device)
        out_dtype = query.dtype if inverse_rms is None else inverse_rms.dtype
        rows = keys.reshape(-1, width)
        grad_query = _gather(rows, row_index, entry_weight.reshape(-1), offsets, out_dtype, backend).view_as(query)
        if inverse_rms is not None:
            grad_query = _through_norm(grad_query, query, inverse_rms)
    if wanted[1]:
        if inverse_rms is not None:
            entry_weight = entry_weight * inverse_rms[..., None]
        row_index, order = torch.sort(row_index, stable=True)
        bounds = torch.arange(keys.shape[:3].numel() + 1, dtype=index_dtype, device=keys.device)
        offsets = torch.searchsorted(row_index, bounds, out_int32=index_dtype == torch.int32)
        entry_weight, bag = entry_weight.reshape(-1)[order], (order // top_k).to(index_dtype)
        rows = query.reshape(-1, width)
        if backend.is_triton and len(bag) > PIECE_ENTRIES:
            grad_keys = _gather_in_pieces(rows, bag, entry_weight, offsets, keys.dtype, backend).view_as(keys)
        else:
            grad_keys = _gather(rows, bag, entry_weight, offsets, keys.dtype, backend).view_as(keys)
    return grad_query, grad_keys


def _gather_in_pieces(
    values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, out_dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Do what `_gather` does where some bags are long: pieces are summed first, and then added in order.

    Most tokens may choose the same sub-key, and one program would still sum its entries when all others are done. There
    are as many pieces as there can be, so that the host need not wait for how many there are; the last ones are empty.
    """
    num_bags, num_entries = offsets.numel() - 1, row_index.numel()
    counts = (offsets.diff() + PIECE_ENTRIES - 1) // PIECE_ENTRIES
    # [B + 1], where the pieces of each bag start
    first_piece = torch.zeros_like(offsets)
    torch.cumsum(counts, 0, out=first_piece[1:])
    piece = torch.arange(num_entries // PIECE_ENTRIES + num_bags + 1, dtype=offsets.dtype, device=offsets.device)
    bag = torch.searchsorted(first_piece[1:], piece, right=True)
    inside = bag.clamp(max=num_bags - 1)
    # Pieces follow each other as entries do: where one starts, the one before ends.
    bounds = offsets[inside] + (piece - first_piece[inside]) * PIECE_ENTRIES
    bounds = torch.where(bag < num_bags, bounds, num_entries)
    sums = _gather(values, row_index, weight, bounds, weight.dtype, backend)
    ones = torch.ones(len(sums), dtype=weight.dtype, device=weight.device)
    return _gather(sums, piece[:-1], ones, first_piece, out_dtype, backend)


def _through_norm(grad: Tensor, query: Tensor, inverse_rms: Tensor) -> Tensor:
    """Gradient of queries from that of queries divided by their root mean square; it may overwrite the latter."""
    inverse_rms = inverse_rms[..., None]
    along = (grad * query).mean(-1, keepdim=True)
    return grad.mul_(inverse_rms).sub_(query * (along * inverse_rms**3))


def _gather(
    values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, out_dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Weighted sums of rows as `weighted_gather` makes them, with weights wider than the rows and rounded once."""
    if backend.is_triton:
        from mempar.kernels.weighted_gather import fused

        out = torch.empty(offsets.numel() - 1, values.shape[1], dtype=out_dtype, device=values.device)
        # The same gradient for both halves may be but one number in memory.
        return fused.gather_into(out, values, row_index, weight.contiguous(), offsets)
    return gather_native.weighted_gather(values.to(weight.dtype), row_index, weight, offsets).to(out_dtype)
