"""An optional loss that asks every lookup to spread its reads over the sub-keys.

For one lookup of T tokens, each head and half has

    N * sum over n of f_n p_n

with f_n the share of the T K chosen slots whose half is sub-key n, and p_n the mean over tokens of the
softmax weight that those slots give sub-key n: 1 when reads are even, N when one sub-key takes them
all (Switch Transformers, arXiv 2101.03961, section 2.2, with sub-keys in place of experts). The loss
of a lookup is the mean over heads and halves. Counts f are not differentiated; the gradient enters
through the weights, where it stands beside the one that comes from the output.

Tokens are those of one micro-batch on one rank, and a product of two means is not the mean of
products: unlike everything else in mempar this loss depends on the micro-batch size and the layout,
as the balance loss of mixtures of experts does in megatron.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class BalanceMeter:
    """Sums the balance losses of lookups until they are taken.

    Attributes:
        totals: `[2] float64`, sum of losses weighted by tokens, and tokens; None before the first lookup.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None

    def add(self, loss: Tensor, num_tokens: int) -> None:
        """Count a lookup's loss `[]` once for each of its tokens."""
        seen = torch.stack((loss.double() * num_tokens, loss.new_tensor(num_tokens, dtype=torch.float64)))
        self.totals = seen if self.totals is None else self.totals + seen

    def take(self, default: Tensor) -> Tensor:
        """Return `totals`, or `default` when nothing was looked up, and forget them."""
        totals, self.totals = self.totals, None
        return default if totals is None else totals


def balanced(weight: Tensor, slot_index: Tensor, num_subkeys: int, coefficient: float) -> tuple[Tensor, Tensor]:
    """Let the gradient of the balance loss enter through a lookup's weights.

    The training loss is a sum over tokens that is divided by the number of unmasked tokens of the global
    batch after backward. A lookup's balance loss is therefore counted once for each of its T tokens:
    what is minimised is the loss a token plus `coefficient` times the mean balance loss of all lookups,
    summed over layers (masked tokens count in it too). There is no loss scale to follow: dtypes that
    need one are not trained.

    Args:
        weight: `[T, H, K]`, softmax weights; differentiable.
        slot_index: `[T, H, K] int64`, the chosen slots.
        num_subkeys: N.
        coefficient: what the loss is multiplied by in the gradient.

    Returns:
        `weight` unchanged, and the loss `[]` before the coefficient, not differentiable. Temporaries are
        of the size of the weights and `[H, 2, N]`.
    """
    return _Balanced.apply(weight, slot_index, num_subkeys, coefficient)


def _chosen_shares(slot_index: Tensor, num_subkeys: int) -> Tensor:
    """For each chosen slot the sum over its halves of f: `[T, H, K] float64`."""
    num_tokens, num_heads, top_k = slot_index.shape
    head = torch.arange(num_heads, device=slot_index.device)[None, :, None] * num_subkeys
    total = torch.zeros(slot_index.shape, dtype=torch.float64, device=slot_index.device)
    for half in (slot_index // num_subkeys, slot_index % num_subkeys):
        place = half + head
        counts = torch.zeros(num_heads * num_subkeys, dtype=torch.int64, device=slot_index.device)
        # Integers: exact in any order.
        counts.index_add_(0, place.flatten(), torch.ones_like(place).flatten())
        total += counts[place].double().div_(max(1, num_tokens * top_k))
    return total


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, slot_index: Tensor, num_subkeys: int, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        num_tokens, num_heads, _ = slot_index.shape
        # The derivative by a weight, times T: p is a mean over T tokens.
        slope = _chosen_shares(slot_index, num_subkeys).mul_(num_subkeys / (2 * num_heads))
        loss = (slope * weight).sum() / max(1, num_tokens)
        ctx.save_for_backward(slope.mul_(coefficient).to(weight.dtype))
        ctx.mark_non_differentiable(loss)
        return weight.view_as(weight), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad + slope, None, None, None
