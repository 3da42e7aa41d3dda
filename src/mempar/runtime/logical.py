"""Logical parameters: one name and one shape for every parameter, whatever the layout.

Megatron names a block by its place in a pipeline stage and holds a tensor-parallel share of it. It
numbers experts from 0 on each rank. Here a parameter has its global block number, and its global expert
number, in its name and its whole shape, and a share is cut out of it or shares are joined to it. Initial
values (initial.py) and comparisons between layouts go through this.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mempar.runtime import mcore

# Megatron's name of the experts of one rank, which are numbered from 0 on each.
_EXPERTS = "mlp.experts.local_experts."


@dataclass(frozen=True, kw_only=True)
class LogicalParameter:
    """A parameter's place in the logical model.

    Attributes:
        name: global name, e.g. `decoder.layers.11.mlp.linear_fc1.weight`.
        param: this rank's share.
        dim: dimension that is split over tensor-parallel ranks; None when every rank holds it whole.
        halves: 2 where the dimension holds two matrices one after the other (gate and up projection),
            each of which is split; 1 otherwise.
        tp: tensor-parallel size.
        tp_rank: this rank's share.
    """

    name: str
    param: nn.Parameter
    dim: int | None
    halves: int
    tp: int
    tp_rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        shape = list(self.param.shape)
        if self.dim is not None:
            shape[self.dim] *= self.tp
        return tuple(shape)

    def share_of(self, whole: Tensor) -> Tensor:
        """Cut this rank's share out of the whole parameter."""
        if self.dim is None or self.tp == 1:
            return whole
        pieces = [half.chunk(self.tp, self.dim)[self.tp_rank] for half in whole.chunk(self.halves, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, shares: list[Tensor]) -> Tensor:
        """Put the shares of all tensor-parallel ranks together."""
        if self.dim is None or self.tp == 1:
            return shares[0]
        split = [share.chunk(self.halves, self.dim) for share in shares]
        return torch.cat([piece for half in zip(*split, strict=True) for piece in half], self.dim)


def logical_parameters(model: Any, *, tp: int, tp_rank: int, ep_rank: int) -> Iterator[LogicalParameter]:
    """Walk over the parameters of one chunk of a GPTModel (not wrapped in DDP or Float16Module).

    Args:
        model: the chunk.
        tp: tensor-parallel size, of experts too.
        tp_rank: this rank's share of split parameters.
        ep_rank: this rank's share of the experts.
    """
    blocks = {str(place): block for place, block in enumerate(model.decoder.layers)}
    for name, param in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, place, rest = name.split(".", 3)
            if rest.startswith(_EXPERTS):
                local, rest = rest.removeprefix(_EXPERTS).split(".", 1)
                rest = f"mlp.experts.{ep_rank * blocks[place].mlp.num_local_experts + int(local)}.{rest}"
            name = f"decoder.layers.{blocks[place].layer_number - 1}.{rest}"
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            # The last stage's copy of a tied embedding: megatron sums its gradient with the first stage's,
            # but the values start equal only if they are drawn under one name.
            name = "embedding.word_embeddings.weight"
        split = bool(getattr(param, "tensor_model_parallel", False))
        yield LogicalParameter(
            name=name,
            param=param,
            dim=param.partition_dim if split else None,
            halves=2 if name.endswith("linear_fc1.weight") else 1,
            tp=tp,
            tp_rank=tp_rank,
        )


def own_parameters(chunks: Iterable[Any]) -> Iterator[LogicalParameter]:
    """Walk over the parameters of chunks in the layout that megatron was told; see `logical_parameters`."""
    state = mcore.parallel_state
    for chunk in chunks:
        yield from logical_parameters(
            chunk,
            tp=state.get_tensor_model_parallel_world_size(),
            tp_rank=state.get_tensor_model_parallel_rank(),
            ep_rank=state.get_expert_model_parallel_rank(),
        )
