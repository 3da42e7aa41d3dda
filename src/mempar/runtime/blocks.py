"""Parts of a transformer block that megatron lacks without TransformerEngine: norm and attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mempar.runtime.mcore import MegatronModule


class RMSNorm(nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism, which megatron's torch norm refuses."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        """Take megatron's arguments; `config` says whether its gradient is summed over tensor ranks."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class CausalAttention(MegatronModule):
    """Causal attention on torch's scaled_dot_product_attention, heads split over tensor ranks.

    The product of queries and keys is never stored, which megatron's unfused attention does.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        """Take megatron's arguments for a core attention; those that do not apply are ignored."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Attend; where there are more keys than queries, the queries are the last positions.

        Args:
            query: `[q, b, heads/tp, width]`.
            key: `[s, b, groups/tp, width]`, s at least q.
            value: `[s, b, groups/tp, width]`.
            attention_mask: must be None; the mask is causal.
            kwargs: what else megatron passes to a core attention.

        Returns:
            `[q, b, heads/tp * width]`.
        """
        assert attention_mask is None
        seen = _seen(len(query), len(key), query.device)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            # Torch lines the first query up with the first key, so that is for equally many.
            is_causal=query.shape[2] == key.shape[2],
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _seen(queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys the last positions see, `[queries, keys] bool`; None where no mask has to say so."""
    if queries in (1, keys):
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
