"""float64 through megatron: the strict form of the layout law needs every step in double precision.

megatron's vocabulary-parallel cross entropy casts logits to float32, and its router of experts their
weights; this keeps wider numbers wide.
"""

from typing import Any

import torch
from torch import Tensor


def keep_wide_logits(cross_entropy: Any) -> None:
    """Make megatron's cross entropy compute in float64 when the logits are float64.

    Args:
        cross_entropy: megatron's VocabParallelCrossEntropy; mending it twice changes nothing.
    """
    original = cross_entropy.calculate_logits_max
    if getattr(original, "keeps_wide_logits", False):
        return

    def calculate_logits_max(logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dtype == torch.float64:
            return logits, logits.max(dim=-1)[0]
        return original(logits)

    calculate_logits_max.keeps_wide_logits = True
    cross_entropy.calculate_logits_max = staticmethod(calculate_logits_max)


def keep_wide_routing(router: Any) -> None:
    """Make megatron's router of experts weigh them in float64 when the logits are float64.

    Args:
        router: megatron's module of the router; mending it twice changes nothing.
    """
    original = router.topk_routing_with_score_function
    if getattr(original, "keeps_wide_logits", False):
        return

    def route(logits: Tensor, topk: int, use_pre_softmax: bool = False, **settings: Any) -> tuple[Tensor, Tensor]:
        if logits.dtype != torch.float64:
            return original(logits, topk, use_pre_softmax=use_pre_softmax, **settings)
        # Chosen by logits, because the rounded softmax has ties; the order is the same.
        _, chosen = original(logits, topk, use_pre_softmax=False, **settings)
        if use_pre_softmax:
            return logits.softmax(-1) * chosen, chosen
        return logits.masked_fill(~chosen, -torch.inf).softmax(-1), chosen

    route.keeps_wide_logits = True
    router.topk_routing_with_score_function = route
