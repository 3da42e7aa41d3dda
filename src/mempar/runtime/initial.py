"""Initial values of dense parameters, each drawn at its logical shape from the run's seed and its global name.

They depend on no layout, and on no megatron: whoever adds layers to a checkpoint draws what the engine would have.
Tables have values of their own (memory/initial.py).
"""

import hashlib

import torch
from torch import Tensor

from mempar.memory import layer as memory_layer


def initial_value(name: str, shape: tuple[int, ...], *, seed: int, init_std: float, num_layers: int) -> Tensor:
    """Draw a whole parameter from the run's seed and the parameter's global name.

    Dense weights are normal(0, std), projections back into the residual stream normal(0, std /
    sqrt(2 L)) as in Megatron's GPT; the memory layer's are its own (facts in memory/layer.py).

    Returns:
        `shape`, float64.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if ".mlp." in name:
        # A layer beside the feed-forward network is a part of it, named `memory`.
        part = name.partition(".mlp.")[2].removeprefix("memory.")
        value = memory_layer.initial_value(part, shape, generator)
        if value is not None:
            return value
    # TransformerEngine fuses norms into the linear layer that follows: `layer_norm_weight`.
    if name.endswith(("norm.weight", "norm_weight")):
        return torch.ones(shape, dtype=torch.float64)
    residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = init_std / (2 * num_layers) ** 0.5 if residual else init_std
    return torch.empty(shape, dtype=torch.float64).normal_(0.0, std, generator=generator)
