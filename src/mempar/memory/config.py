"""Settings of the memory layers, checked when they are created.

The defaults are those of "Memory Layers at Scale" (arXiv 2412.09764): Memory+ with three layers
sharing one table, four heads, 32 rows a head, no query/key normalisation.
"""

import math
from dataclasses import dataclass

from mempar.errors import ConfigError

VARIANTS = ("memory", "memory_plus", "peer")
OPTIMIZERS = ("adamw", "row_adam")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Shape, placement and optimizer of the memory layers.

    Attributes:
        enabled: False trains the dense model, with no memory layer at all.
        variant: `memory` (the FFN is replaced by the lookup itself), `memory_plus` (the lookup is
            gated by silu and projected) or `peer` (each slot is an expert of one neuron: a row that reads
            the input and a row that is added; arXiv 2407.04153).
        layers: 0-based numbers of the blocks whose FFN is replaced; all of them share the tables.
        beside: leave the FFN of these blocks where it is and add the memory's output to its output.
        num_subkeys: N; the table has N * N slots.
        heads: H.
        top_k: K, at most N.
        key_dim: 2Q, the width of a whole key; even.
        value_dim: D; 0 means the model's width. `memory` and `peer` need D equal to the model's width.
        qk_norm: RMS-normalise queries and keys before they meet.
        scalar_gate: scale the output by sigmoid of one learned projection of the input.
        optimizer: `adamw` (exact, dense) or `row_adam` (moments and values change in touched rows
            only).
        lr: peak learning rate of the values; 0 means ten times the dense one.
        weight_decay: decoupled decay of the values; negative means the dense one.
        clip_grad: limit of the gradient norm of the values alone; 0 turns it off.
        balance_loss: coefficient of the loss that asks for even reads (see balance.py); 0 turns it off.
        check_interval: steps between two comparisons of copies that must be bit for bit equal (of the table
            between its replicas and stages, of dense parameters between data-parallel ranks); 0 never compares.
        column_tile: width of the unit in which columns are cut and row statistics are kept.
    """

    enabled: bool = True
    variant: str = "memory_plus"
    layers: tuple[int, ...] = ()
    beside: bool = False
    num_subkeys: int = 1024
    heads: int = 4
    top_k: int = 32
    key_dim: int = 512
    value_dim: int = 0
    qk_norm: bool = False
    scalar_gate: bool = False
    optimizer: str = "row_adam"
    lr: float = 0.0
    weight_decay: float = -1.0
    clip_grad: float = 1.0
    column_tile: int = 128
    balance_loss: float = 0.0
    check_interval: int = 1000

    def __post_init__(self) -> None:
        """Check every setting that does not depend on the rest of the run."""
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"memory.variant={self.variant} is not known; it is one of {', '.join(VARIANTS)}; "
                "set memory.variant to one of these."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"memory.optimizer={self.optimizer} is not known; it is one of {', '.join(OPTIMIZERS)}; "
                "set memory.optimizer to one of these."
            )
        for name in ("num_subkeys", "heads", "top_k", "key_dim", "column_tile"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory.{name}={getattr(self, name)} must be at least 1; raise it.")
        if self.key_dim % 2:
            raise ConfigError(f"memory.key_dim={self.key_dim} is odd; a key has two halves; use an even width.")
        if self.top_k > self.num_subkeys:
            raise ConfigError(
                f"memory.top_k={self.top_k} exceeds memory.num_subkeys={self.num_subkeys}; each half offers "
                "only num_subkeys candidates; lower top_k or raise num_subkeys."
            )
        if len(set(self.layers)) != len(self.layers) or list(self.layers) != sorted(self.layers):
            raise ConfigError(
                f"memory.layers={list(self.layers)} must be distinct and ascending; "
                "write each block once, lowest first."
            )
        for name in ("value_dim", "lr", "clip_grad", "balance_loss", "check_interval"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"memory.{name}={getattr(self, name)} must be a number of at least 0; 0 takes its default or "
                    "turns it off."
                )
        if not -math.inf < self.weight_decay < math.inf:
            raise ConfigError(f"memory.weight_decay={self.weight_decay} must be finite; a negative one takes optim's.")

    @property
    def table_names(self) -> tuple[str, ...]:
        """The tables of this memory: `values`, and `down` where each slot reads the input too."""
        return ("values", "down") if self.variant == "peer" else ("values",)

    @property
    def num_slots(self) -> int:
        """S, the number of rows of the table."""
        return self.num_subkeys**2

    @property
    def half_key_dim(self) -> int:
        """Q, the width of half a key."""
        return self.key_dim // 2
