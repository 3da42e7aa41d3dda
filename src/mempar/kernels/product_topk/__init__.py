"""Exact top-K of the product keys: the K best slots of each head out of S = N * N.

A slot's score is the sum of two half scores, so its two halves are among the K best of their half
(arXiv 1907.05242, section 3.1). Ties go to the lowest slot. The backward pass is sparse: only the
selected keys receive gradient, and no gradient `[T, H, N]` is made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.kernels.dispatch import Backend
from mempar.kernels.product_topk.stable import stable_topk
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.weighted_gather import weighted_gather


def product_topk(
    query: Tensor, keys: Tensor, top_k: int, slot_index: Tensor | None = None, *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Choose the K best slots of every token and head.

    Args:
        query: `[T, H, 2, Q]`, float32 or wider.
        keys: `[H, 2, N, Q]`, the dtype of `query`.
        top_k: K, at most N.
        slot_index: `[T, H, K] int64`: take these slots instead of choosing (a recorded run).
        backend: what computes it.

    Returns:
        `slot_index [T, H, K] int64` and the scores `[T, H, K]`, best first; differentiable in
        `query` and `keys`.
    """
    return _ProductTopk.apply(query, keys, top_k, slot_index, backend)


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """`[H, 2, T, N]` scores of all sub-keys of both halves."""
    return query.permute(1, 2, 0, 3) @ keys.transpose(-1, -2)


def select_slots(scores: Tensor, top_k: int) -> Tensor:
    """Return the `[T, H, K] int64` best slots, ordered by (score descending, slot ascending).

    Args:
        scores: `[H, 2, T, N]`, as `half_scores` returns them.
        top_k: K, at most N.
    """
    num_subkeys = scores.shape[-1]
    best, index = stable_topk(scores, top_k)
    # Both lists are sorted, so pair (a, b) is beaten by (a + 1)(b + 1) - 1 others: only pairs with
    # (a + 1)(b + 1) <= K can win. At K=32 that is 119 of 1024 candidates.
    rank = torch.arange(1, top_k + 1, device=scores.device)
    first, second = torch.nonzero(rank[:, None] * rank[None, :] <= top_k, as_tuple=True)
    candidates = index[:, 0][..., first] * num_subkeys + index[:, 1][..., second]
    _, chosen = stable_topk(best[:, 0][..., first] + best[:, 1][..., second], top_k, tie_key=candidates)
    return candidates.gather(-1, chosen).transpose(0, 1).contiguous()


class _ProductTopk(torch.autograd.Function):
    """Slots and their scores, with gradients that touch the selected keys only."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, top_k: int, slot_index: Tensor | None, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        scores = half_scores(query, keys)
        if slot_index is None:
            slot_index = select_slots(scores, top_k)
        # [H, 2, T, K]: the sub-key of each half
        halves = torch.stack((slot_index // keys.shape[2], slot_index % keys.shape[2])).permute(2, 0, 1, 3)
        selected = scores.gather(-1, halves).sum(1).transpose(0, 1)
        ctx.backend = backend
        ctx.save_for_backward(query, keys, halves)
        ctx.mark_non_differentiable(slot_index)
        return slot_index, selected.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, keys, halves = ctx.saved_tensors
        num_heads, _, num_subkeys, width = keys.shape
        num_tokens, top_k = halves.shape[2:]
        # Bags are the (token, head, half) rows of the queries, rows the (head, half, sub-key) rows of the keys.
        num_bags = num_tokens * num_heads * 2
        list_start = torch.arange(num_heads * 2, device=keys.device).view(num_heads, 2, 1, 1) * num_subkeys
        row_index = (list_start + halves).permute(2, 0, 1, 3).reshape(-1).int()
        weight = grad[:, :, None].expand(-1, -1, 2, -1).reshape(-1)
        offsets = torch.arange(0, num_bags * top_k + 1, top_k, dtype=torch.int32, device=keys.device)
        grad_query = weighted_gather(keys.reshape(-1, width), row_index, weight, offsets, backend=ctx.backend)
        bag_index = torch.arange(num_bags, dtype=torch.int32, device=keys.device).repeat_interleave(top_k)
        rows, sums = reduce_rows(row_index, weight, bag_index, query.reshape(-1, width), backend=ctx.backend)
        grad_keys = torch.zeros_like(keys).view(-1, width).index_copy_(0, rows.long(), sums)
        return grad_query.view_as(query), grad_keys.view_as(keys), None, None, None
