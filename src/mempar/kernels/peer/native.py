"""`peer` and its gradients of torch's own operators: what runs on CPUs."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.kernels.weighted_gather import bag_of_entries
from mempar.kernels.weighted_gather.native import gather_scores, weighted_gather


class PeerGrads(NamedTuple):
    """Gradients of `peer`, those of rows as the coefficients that they are made of.

    Attributes:
        x: `[B, D]`, the dtype of the tables.
        weight: `[E]`, the dtype of the weights.
        value_weight: `[E]`, the dtype of the tables: row e of `values` gets it times the gradient of its bag.
        down_weight: `[E]`, the dtype of the tables: row e of `down` gets it times the input of its bag.
    """

    x: Tensor
    weight: Tensor
    value_weight: Tensor
    down_weight: Tensor


def peer(
    down: Tensor, values: Tensor, row_index: Tensor, weight: Tensor, offsets: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Ask the experts of every bag; see the public operation."""
    bags = bag_of_entries(offsets, len(row_index))
    hidden = gather_scores(down, row_index, bags, x).to(weight.dtype)
    strength = (weight * F.gelu(hidden)).to(values.dtype)
    return weighted_gather(values, row_index, strength, offsets), hidden


def peer_backward(
    down: Tensor,
    values: Tensor,
    row_index: Tensor,
    weight: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    grad: Tensor,
) -> PeerGrads:
    """Gradients of `peer`; see the public operation."""
    bags = bag_of_entries(offsets, len(row_index))
    score = gather_scores(values, row_index, bags, grad.contiguous()).to(weight.dtype)
    active = F.gelu(hidden)
    down_weight = torch.ops.aten.gelu_backward(weight * score, hidden).to(values.dtype)
    return PeerGrads(
        x=weighted_gather(down, row_index, down_weight, offsets),
        weight=active * score,
        value_weight=(weight * active).to(values.dtype),
        down_weight=down_weight,
    )
