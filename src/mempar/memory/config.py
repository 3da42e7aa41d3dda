"""Settings of the memory layers, checked when they are created.

The defaults are those of "Memory Layers at Scale" (arXiv 2412.09764): Memory+ with three layers
sharing one table, four heads, 32 rows a head, no query/key normalisation.
"""

import math
from dataclasses import dataclass

from mempar.errors import ConfigError

VARIANTS = ("memory", "memory_plus", "peer")
OPTIMIZERS = ("adamw", "row_adam", "row_adagrad")
# The settings that take one of a few words; an empty word leaves the choice to the run's other settings.
_CHOICES = {
    "variant": VARIANTS,
    "optimizer": OPTIMIZERS,
    "dtype": ("", "float32", "bf16"),
    "rounding": ("master", "stochastic", "nearest"),
    "moments_dtype": ("float32", "bf16"),
    "score_dtype": ("float32", "bf16"),
    "clip": ("own", "joint"),
}
MERGING = ("auto", "on", "off")


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
        score_dtype: of the scores of half keys: `float32` (at least) or `bf16`, which is faster on a GPU and ties more
            often; ties go to the lowest slot.
        qk_norm: RMS-normalise queries and keys before they meet.
        scalar_gate: scale the output by sigmoid of one learned projection of the input.
        dtype: of the table and of what is sent for it: empty (the training dtype), `bf16` or `float32`.
        rounding: of a bf16 table's updates: `master` (float32 values beside them), `stochastic` (no master,
            unbiased) or `nearest` (no master; loses small updates, for comparison).
        optimizer: `adamw` (exact, dense), `row_adam` or `row_adagrad` (state and values change in touched rows
            only); memory/optimizer has the formulas.
        moments_dtype: of row_adam's moments: `float32` (at least) or `bf16`.
        lr: peak learning rate of the values; 0 means `lr_multiplier` times the dense one.
        lr_multiplier: see `lr`.
        schedule: of the values' learning rate, with optim's warm-up, floor and ends; empty means the dense one.
        weight_decay: decoupled decay of the values; negative means the dense one.
        clip: `own` limits the values' gradient norm alone to `clip_grad`; `joint` limits the norm of dense and
            values' gradients together to optim.clip_grad.
        clip_grad: limit under `clip=own`; 0 turns it off.
        deposit_bytes: bytes of gradient records that a rank keeps before it sums them by row; 0 keeps all until
            the end of the step.
        merge_duplicates: whether reads of a token that chose the same slot (in different heads) travel as one:
            `auto` (where that pays, see `parallel/cost.py`), `on` or `off`.
        balance_loss: coefficient of the loss that asks for even reads (see balance.py); 0 turns it off.
        check_interval: steps between two comparisons of copies that must be bit for bit equal (of the table
            between its replicas and stages, of dense parameters between data-parallel ranks, and of those that are not
            split between tensor-parallel ranks); 0 never compares.
        column_tile: width of the unit in which columns are cut and row statistics are kept.
        usage_interval: steps between reports of how the table is used (coverage, dead slots, skew, entropy of the
            heads); 0 never counts anything.
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
    score_dtype: str = "float32"
    qk_norm: bool = False
    scalar_gate: bool = False
    dtype: str = ""
    rounding: str = "master"
    optimizer: str = "row_adam"
    moments_dtype: str = "float32"
    lr: float = 0.0
    lr_multiplier: float = 10.0
    schedule: str = ""
    weight_decay: float = -1.0
    clip: str = "own"
    clip_grad: float = 1.0
    merge_duplicates: str = "auto"
    deposit_bytes: int = 0
    column_tile: int = 128
    usage_interval: int = 100
    balance_loss: float = 0.0
    check_interval: int = 1000

    def __post_init__(self) -> None:
        """Check every setting that does not depend on the rest of the run."""
        for name, choices in _CHOICES.items():
            self._check_choice(name, choices)
        if self.moments_dtype != "float32" and self.optimizer != "row_adam":
            raise ConfigError(
                f"memory.moments_dtype={self.moments_dtype} with memory.optimizer={self.optimizer}: only row_adam's "
                "moments can be narrower than float32; use memory.optimizer=row_adam or memory.moments_dtype=float32."
            )
        if self.merge_duplicates not in MERGING:
            raise ConfigError(
                f"memory.merge_duplicates={self.merge_duplicates} is not known; it is one of {', '.join(MERGING)}; "
                "set memory.merge_duplicates to one of these (in YAML in quotes)."
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
        for name in ("value_dim", "lr", "clip_grad", "deposit_bytes", "balance_loss", "check_interval"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"memory.{name}={getattr(self, name)} must be a number of at least 0; 0 takes its default or "
                    "turns it off."
                )
        if self.usage_interval < 0:
            raise ConfigError(
                f"memory.usage_interval={self.usage_interval} is negative; it is a number of steps, and 0 never "
                "reports; use a number of at least 0."
            )
        if not 0 < self.lr_multiplier < math.inf:
            raise ConfigError(
                f"memory.lr_multiplier={self.lr_multiplier} must be a positive number; the values learn at that many "
                "times the dense rate; raise it, or set memory.lr."
            )
        if not -math.inf < self.weight_decay < math.inf:
            raise ConfigError(f"memory.weight_decay={self.weight_decay} must be finite; a negative one takes optim's.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(
                f"memory.{name}={value} is not known; it is one of {', '.join(filter(None, choices))}; "
                f"set memory.{name} to one of these."
            )

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
