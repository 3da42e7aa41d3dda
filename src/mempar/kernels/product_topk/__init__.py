"""Exact top-K of the product keys: the K best slots of each head out of S = N * N.

A slot's score is the sum of two half scores, so its two halves are among the K best of their half
(arXiv 1907.05242, section 3.1). Ties go to the lowest slot. The backward pass is sparse: only the
selected keys receive gradient, and no gradient `[T, H, N]` is made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.kernels.product_topk.stable import stable_topk
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.weighted_gather import weighted_gather


def product_topk(query: Tensor, keys: Tensor, top_k: int, slot_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the K best slots of every token and head.

    Args:
        query: `[T, H, 2, Q]`, float32 or wider.
        keys: `[H, 2, N, Q]`, the dtype of `query`.
        top_k: K, at most N.
        slot_index: `[T, H, K] int64`: take these slots instead of choosing (a recorded run).

    Returns:
        `slot_index [T, H, K] int64` and the scores `[T, H, K]`, best first; differentiable in
        `query` and `keys`.
    """
    if slot_index is None:
        with torch.no_grad():
            slot_index = select_slots(query, keys, top_k)
    scores = _SelectedScores.apply(query, keys, slot_index)
    return slot_index, scores


def half_scores(query: Tensor, keys: Tensor, half: int) -> Tensor:
    """`[T, H, N]` scores of one half's sub-keys."""
    return torch.einsum("thq,hnq->thn", query[:, :, half], keys[:, half])


def select_slots(query: Tensor, keys: Tensor, top_k: int) -> Tensor:
    """Return the `[T, H, K] int64` best slots, ordered by (score descending, slot ascending)."""
    num_subkeys = keys.shape[2]
    score1, index1 = stable_topk(half_scores(query, keys, 0), top_k)
    score2, index2 = stable_topk(half_scores(query, keys, 1), top_k)
    # Both lists are sorted, so pair (a, b) is beaten by (a + 1)(b + 1) - 1 others: only pairs with
    # (a + 1)(b + 1) <= K can win. At K=32 that is 119 of 1024 candidates.
    rank = torch.arange(1, top_k + 1, device=query.device)
    first, second = torch.nonzero(rank[:, None] * rank[None, :] <= top_k, as_tuple=True)
    candidates = index1[..., first] * num_subkeys + index2[..., second]
    _, chosen = stable_topk(score1[..., first] + score2[..., second], top_k, tie_key=candidates)
    return candidates.gather(-1, chosen)


class _SelectedScores(torch.autograd.Function):
    """Scores of given slots, with gradients that touch the selected keys only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, slot_index: Tensor) -> Tensor:
        num_heads, _, num_subkeys, width = keys.shape
        head_start = torch.arange(num_heads, device=keys.device)[:, None] * num_subkeys
        ctx.save_for_backward(query, keys, slot_index)
        scores = torch.zeros(slot_index.shape, dtype=query.dtype, device=query.device)
        for half, index in enumerate(_halves(slot_index, num_subkeys)):
            flat_keys = keys[:, half].reshape(num_heads * num_subkeys, width)
            selected = flat_keys[(head_start + index).reshape(-1)].view(*index.shape, width)
            scores += (selected @ query[:, :, half, :, None]).squeeze(-1)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, keys, slot_index = ctx.saved_tensors
        num_tokens, num_heads, top_k = slot_index.shape
        num_subkeys, width = keys.shape[2:]
        head_start = torch.arange(num_heads, device=keys.device)[:, None] * num_subkeys
        offsets = torch.arange(0, slot_index.numel() + 1, top_k, device=keys.device)
        bag_index = torch.arange(num_tokens * num_heads, device=keys.device).repeat_interleave(top_k)
        weight = grad.reshape(-1)
        grad_query, grad_keys = torch.empty_like(query), torch.zeros_like(keys)
        for half, index in enumerate(_halves(slot_index, num_subkeys)):
            row_index = (head_start + index).reshape(-1)
            flat_keys = keys[:, half].reshape(num_heads * num_subkeys, width)
            grad_query[:, :, half] = weighted_gather(flat_keys, row_index, weight, offsets).view(
                num_tokens, num_heads, width
            )
            flat_query = query[:, :, half].reshape(num_tokens * num_heads, width)
            rows, sums = reduce_rows(row_index, weight, bag_index, flat_query)
            grad_keys[rows // num_subkeys, half, rows % num_subkeys] = sums
        return grad_query, grad_keys, None


def _halves(slot_index: Tensor, num_subkeys: int) -> tuple[Tensor, Tensor]:
    return slot_index // num_subkeys, slot_index % num_subkeys
