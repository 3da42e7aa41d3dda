"""Which pairs of ranks can be among the K best sums of two sorted lists."""

import torch
from torch import Tensor


def winning_pairs(top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs of ranks (a, b), from 0, with (a + 1)(b + 1) <= K; the host does not wait.

    Pair (a, b) follows (a + 1)(b + 1) - 1 others, of no greater ranks, whose sums are no smaller. At K=32 that leaves
    119 of 1024 pairs.

    Args:
        top_k: K.
        device: where they are wanted.

    Returns:
        Two `[P] int64`, ordered by the first.
    """
    partners = [top_k // rank for rank in range(1, top_k + 1)]
    rank = torch.arange(top_k, device=device)
    count = top_k // (rank + 1)
    first = torch.repeat_interleave(rank, count, output_size=sum(partners))
    return first, torch.arange(sum(partners), device=device) - (count.cumsum(0) - count)[first]
