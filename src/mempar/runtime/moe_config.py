"""Settings of mixture-of-experts blocks, checked when they are created.

The experts are megatron-core's own, with token choice: every token goes to the experts whose router
logits are largest, and none is dropped. They are a baseline beside memory layers, and may share a
model with them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mempar.errors import ConfigError

if TYPE_CHECKING:
    from mempar.runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Shape and placement of mixture-of-experts blocks.

    Attributes:
        num_experts: experts of each block; 0 trains without any, whatever the other settings say.
        top_k: experts that each token is sent to. Their weights are the softmax over their logits; with
            one, the softmax over all logits, which would otherwise always be 1.
        ffn_hidden_size: width of one expert; 0 means that of a dense block.
        layers: 0-based numbers of the blocks whose FFN is replaced; empty means every block without a
            memory layer.
        aux_loss: coefficient of the load-balancing loss of Switch Transformers (arXiv 2101.03961). It is
            taken over each micro-batch, so with it runs depend on the layout.
    """

    num_experts: int = 0
    top_k: int = 2
    ffn_hidden_size: int = 0
    layers: tuple[int, ...] = ()
    aux_loss: float = 0.0

    def __post_init__(self) -> None:
        """Check every setting that does not depend on the rest of the run."""
        for name, minimum in (("num_experts", 0), ("top_k", 1), ("ffn_hidden_size", 0)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"moe.{name}={getattr(self, name)} must be at least {minimum}; raise it.")
        if self.num_experts and self.top_k > self.num_experts:
            raise ConfigError(
                f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}; a token goes to distinct experts; "
                "lower moe.top_k or raise moe.num_experts."
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"moe.layers={list(self.layers)} must be distinct and ascending; write each block once, lowest first."
            )
        if not 0 <= self.aux_loss < math.inf:
            raise ConfigError(f"moe.aux_loss={self.aux_loss} must be a number of at least 0; 0 turns it off.")

    @property
    def enabled(self) -> bool:
        """Whether there are experts at all."""
        return self.num_experts > 0


def check_experts(run: "RunConfig") -> None:
    """Check the experts against the rest of a run.

    Raises:
        ConfigError: when they do not fit the model or the layout.
    """
    moe, sizes, last = run.moe, run.parallel, run.model.num_layers - 1
    if not moe.enabled:
        if sizes.ep > 1:
            raise ConfigError(
                f"parallel.ep={sizes.ep} with moe.num_experts=0: there are no experts to divide; use "
                "parallel.ep=1, or set moe.num_experts."
            )
        return
    if moe.num_experts % sizes.ep:
        raise ConfigError(
            f"parallel.ep={sizes.ep} does not divide moe.num_experts={moe.num_experts}; expert-parallel ranks hold "
            "equally many experts; change one of them."
        )
    if moe.layers and (moe.layers[-1] > last or moe.layers[0] < 0):
        raise ConfigError(
            f"moe.layers={list(moe.layers)} leaves the model's blocks 0 to {last} "
            f"(model.num_layers={run.model.num_layers}); name blocks inside it."
        )
    both = sorted(set(moe.layers) & set(run.memory_layers))
    if both:
        raise ConfigError(
            f"moe.layers names the blocks {both}, which have memory layers in the place of an FFN or beside one; "
            "experts stand in its place too; take these blocks out of moe.layers or out of the memory."
        )
    if not run.moe_layers:
        raise ConfigError(
            f"moe.num_experts={moe.num_experts}, but all {run.model.num_layers} blocks have memory layers, which "
            "leaves none for experts; shorten memory.layers, or use moe.num_experts=0."
        )
    if sizes.tp > 1 and not sizes.sequence_parallel:
        raise ConfigError(
            f"moe.num_experts={moe.num_experts} with parallel.tp={sizes.tp} needs parallel.sequence_parallel=true: "
            "megatron routes the tokens of each tensor-parallel rank, which otherwise all hold the same ones; turn "
            "it on, or use parallel.tp=1."
        )
    if moe.aux_loss and run.train.dtype == "float64":
        raise ConfigError(
            f"moe.aux_loss={moe.aux_loss} with train.dtype=float64: megatron computes this loss in float32; use "
            "moe.aux_loss=0, or float32."
        )
