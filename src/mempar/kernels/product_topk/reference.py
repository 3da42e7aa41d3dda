"""The definition of `product_topk`, by brute force over all slots, for tests."""

import torch
from torch import Tensor


def normalised(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`x [..., Q]` divided by its root mean square and weighted by `weight [Q]`; itself without a weight."""
    return x if weight is None else x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def half_scores(
    query: Tensor, keys: Tensor, query_norm: Tensor | None = None, key_norm: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """`[H, 2, T, N]` scores of all sub-keys of both halves."""
    query, keys = normalised(query, query_norm, epsilon), normalised(keys, key_norm, epsilon)
    return torch.einsum("thcq,hcnq->hctn", query, keys)


def slot_scores(scores: Tensor) -> Tensor:
    """`[T, H, N * N]` scores of all slots, from half scores `[H, 2, T, N]`."""
    return (scores[:, 0, :, :, None] + scores[:, 1, :, None, :]).flatten(-2).transpose(0, 1)


def select_slots(scores: Tensor, top_k: int) -> Tensor:
    """`[T, H, K]` best slots by sorting the scores of all `[T, H, N * N]`; ties go to the lowest slot."""
    return torch.sort(slot_scores(scores), dim=-1, descending=True, stable=True)[1][..., :top_k]


def slot_weights(scores: Tensor, slot_index: Tensor) -> Tensor:
    """`[T, H, K]` softmax weights of given slots."""
    return slot_scores(scores).gather(-1, slot_index).softmax(-1)
