"""The memory layer itself: queries, product-key lookup, weighted rows, gate.

It stands where a block's feed-forward network stood, or beside it, and sees the same RMS-normed input.
It holds its own queries and keys; the rows belong to tables that several layers share and that it
reaches through `Readers`. Definition: "Memory Layers at Scale" (arXiv 2412.09764), section 3; with
`peer` a slot is an expert of one neuron, `w gelu(u . x) v` ("Mixture of A Million Experts",
arXiv 2407.04153, without its batch normalisation).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.product_topk import product_topk
from mempar.marks import Marks
from mempar.memory.balance import BalanceMeter, balanced
from mempar.memory.config import MemoryConfig
from mempar.memory.lookup import Readers

# Given the chosen slots [T, H, K], returns the slots to use: records or replays choices.
SlotHook = Callable[[Tensor | None], Tensor | None]


class MemoryLayer(nn.Module):
    """Product-key memory in place of a feed-forward network or beside it."""

    def __init__(self, config: MemoryConfig, model_dim: int, norm_epsilon: float, backend: Backend = TORCH) -> None:
        """Allocate parameters; initial values are drawn by the runtime, by logical name.

        Args:
            config: shape and variant.
            model_dim: C.
            norm_epsilon: epsilon of the optional query and key norms.
            backend: what computes lookups.
        """
        super().__init__()
        self.config = config
        self.norm_epsilon = norm_epsilon
        self.backend = backend
        self.marks = Marks()
        self.balance = BalanceMeter()
        self.query = nn.Linear(model_dim, config.heads * config.key_dim)
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.num_subkeys, config.half_key_dim))
        if config.qk_norm:
            # Not q_layernorm / k_layernorm: megatron gives these names a meaning of its own.
            self.query_norm = nn.RMSNorm(config.half_key_dim, eps=norm_epsilon)
            self.key_norm = nn.RMSNorm(config.half_key_dim, eps=norm_epsilon)
        if config.variant == "memory_plus":
            value_dim = config.value_dim or model_dim
            self.gate_proj = nn.Linear(model_dim, value_dim)
            self.output_proj = nn.Linear(value_dim, model_dim)
        if config.scalar_gate:
            self.scalar_gate = nn.Linear(model_dim, 1)

    def choose(self, x: Tensor, slot_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose slots and weigh them.

        Args:
            x: `[T, C]`.
            slot_index: `[T, H, K] int64`, to take recorded slots instead of choosing.

        Returns:
            `slot_index [T, H, K] int64` and the softmax weights `[T, H, K]`, in float32 at least.
        """
        with self.marks.span("query"):
            query = self.query(x)
        self.marks.backward_of(query, "query_backward")
        self.marks.backward_ends_after(query)
        with self.marks.span("topk"):
            chosen = product_topk(
                query.view(len(x), self.config.heads, 2, self.config.half_key_dim),
                self.keys,
                self.config.top_k,
                slot_index,
                backend=self.backend,
                score_dtype=torch.bfloat16 if self.config.score_dtype == "bf16" else torch.float32,
                query_norm=self.query_norm.weight if self.config.qk_norm else None,
                key_norm=self.key_norm.weight if self.config.qk_norm else None,
                norm_epsilon=self.norm_epsilon,
            )
        self.marks.backward_of(chosen[1], "topk_backward")
        return chosen

    def forward(
        self, x: Tensor, readers: Readers, hook: SlotHook | None = None, token_counts: list[int] | None = None
    ) -> Tensor:
        """Read the memory.

        Args:
            x: `[T, C]`, RMS-normed.
            readers: where the rows are.
            hook: called with None before the choice (returning slots replays them) and with the
                chosen slots after it.
            token_counts: passed on to the readers.

        Returns:
            `[T, C]`.
        """
        replayed = hook(None) if hook is not None else None
        slot_index, weight = self.choose(x, replayed)
        if hook is not None:
            hook(slot_index)
        # Under recomputation a lookup runs twice, of which the pass with gradients counts.
        if self.config.balance_loss and torch.is_grad_enabled():
            weight, loss = balanced(weight, slot_index, self.config.num_subkeys, self.config.balance_loss)
            self.balance.add(loss, len(x))
        slot_index, weight = slot_index.flatten(1), weight.flatten(1)
        found = readers.values.find(slot_index, token_counts)
        if self.config.variant == "peer":
            out = readers.read_experts(found, weight, x).to(x.dtype)
        else:
            out = readers.values.read(found, weight).to(x.dtype)
        self.marks.backward_of(out, "")
        return self._gated(out, x)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        """Let the gates of the variant act on what was read, `[T, D]`; returns `[T, C]`."""
        if self.config.variant != "memory_plus" and not self.config.scalar_gate:
            return out
        with self.marks.span("gate"):
            if self.config.variant == "memory_plus":
                out = self.output_proj(out * F.silu(self.gate_proj(x)))
            if self.config.scalar_gate:
                out = out * torch.sigmoid(self.scalar_gate(x))
        self.marks.backward_of(out, "gate_backward")
        return out


def initial_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """Draw the initial value of one of the layer's parameters at its logical shape, in float64.

    Args:
        name: the parameter's name within the layer.
        shape: its shape.
        generator: where the numbers come from.

    Returns:
        The values, or None when the name is not one of this layer's.
    """
    draw = torch.empty(shape, dtype=torch.float64)
    match name:
        case "query.weight":
            return nn.init.xavier_uniform_(draw, generator=generator)
        case "keys":
            bound = 1.0 / math.sqrt(2 * shape[-1])
            return draw.uniform_(-bound, bound, generator=generator)
        case "gate_proj.weight" | "output_proj.weight" | "scalar_gate.weight":
            model_dim = shape[0] if name.startswith("output_proj") else shape[1]
            return draw.normal_(0.0, model_dim**-0.5, generator=generator)
        case "query.bias" | "gate_proj.bias" | "output_proj.bias" | "scalar_gate.bias":
            return draw.zero_()
        case "query_norm.weight" | "key_norm.weight":
            return draw.fill_(1.0)
    return None
