"""float64 through megatron: the strict form of the layout law needs every step in double precision.

megatron's vocabulary-parallel cross entropy casts logits to float32; this keeps wider logits wide.
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
