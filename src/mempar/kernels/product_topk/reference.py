"""The definition of the product-key top-K, by brute force over all slots, for tests."""

import torch
from torch import Tensor


def select_slots(query: Tensor, keys: Tensor, top_k: int) -> Tensor:
    """`[T, H, K]` best slots by sorting all `[T, H, N * N]` scores; ties go to the lowest slot."""
    score1 = torch.einsum("thq,hnq->thn", query[:, :, 0], keys[:, 0])
    score2 = torch.einsum("thq,hnq->thn", query[:, :, 1], keys[:, 1])
    scores = (score1[..., :, None] + score2[..., None, :]).flatten(-2)
    return torch.sort(scores, dim=-1, descending=True, stable=True)[1][..., :top_k]
