"""Sections of a run's configuration: the model's shape, parallel sizes, the dense optimizer, data, kernels.

Frozen dataclasses that check what does not depend on other sections; `config.py` puts them together.
"""

import math
from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.kernels.dispatch import BACKENDS

SCHEDULES = ("linear", "cosine", "wsd", "constant")


def at_least(section: str, settings: object, minimum: float, *names: str) -> None:
    """Refuse settings that are not finite numbers of at least a minimum."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name}={value} must be at least {minimum}; raise {section}.{name}.")


def one_of(section: str, settings: object, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of some words."""
    value = getattr(settings, name)
    if value not in choices:
        raise ConfigError(
            f"{section}.{name}={value} is not known; it is one of {', '.join(choices)}; set it to one of these."
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention.

    `vocab_size=0` takes the tokenizer's size. The vocabulary is padded to a multiple of
    `vocab_multiple`, whatever the tensor-parallel size, so that initial values do not depend on it.
    """

    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int = 0
    ffn_hidden_size: int = 2048
    vocab_size: int = 0
    vocab_multiple: int = 128
    rotary_base: int = 10000
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """Check what does not depend on the parallel layout."""
        at_least(
            "model", self, 1, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_multiple"
        )
        at_least("model", self, 0, "num_query_groups", "vocab_size")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.num_attention_heads="
                f"{self.num_attention_heads}; heads share the width equally; change one of them."
            )
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups={self.query_groups}; groups share the heads equally; change one of them."
            )

    @property
    def query_groups(self) -> int:
        """Key/value heads; as many as query heads by default."""
        return self.num_query_groups or self.num_attention_heads

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of that size."""
        size = self.vocab_size or vocab_size
        return -(-size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions; what remains of the ranks is data parallel.

    The `ep` ranks over which experts are divided, and the `mp` ranks over which a table is cut, come out of
    the ranks of one pipeline stage and see different tokens.
    `mp_rows=0` chooses columns or rows by the bytes that they send (see `parallel/cost.py`). `mp_hops=2` reduces
    the sums of a grid over its row shards, inside a node where a node has `mp_rows` ranks, before they cross to
    other column shards. `vpp=0` takes the fewest virtual stages that put all layers of the table on one stage
    (see placement.py).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    mp: int = 1
    mp_rows: int = 0
    mp_hops: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        at_least("parallel", self, 1, "tp", "pp", "cp", "ep", "mp")
        at_least("parallel", self, 0, "vpp", "mp_rows")
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"parallel.vpp={self.vpp} with parallel.pp=1: virtual stages interleave a pipeline; "
                "raise parallel.pp or drop parallel.vpp."
            )
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true with parallel.tp=1: it splits sequences over the tensor-parallel "
                "ranks; raise parallel.tp or turn it off."
            )
        if self.mp_rows and self.mp % self.mp_rows:
            raise ConfigError(
                f"parallel.mp_rows={self.mp_rows} does not divide parallel.mp={self.mp}; the shards form a grid of "
                "mp_rows x mp / mp_rows; use a divisor of parallel.mp."
            )
        if self.mp_hops not in (1, 2):
            raise ConfigError(
                f"parallel.mp_hops={self.mp_hops} is not known; sums take one hop, or two on a grid; use 1 or 2."
            )
        if self.mp_hops == 2 and not 1 < self.mp_rows < self.mp:
            raise ConfigError(
                f"parallel.mp_hops=2 with parallel.mp_rows={self.mp_rows}, parallel.mp={self.mp}: the hops go over row "
                "shards and over column shards, so a grid needs several of both; set parallel.mp_rows to a divisor of "
                "parallel.mp between the two, or use parallel.mp_hops=1."
            )

    @property
    def smallest_world(self) -> int:
        """The least number of ranks that this layout can run on."""
        return self.pp * math.lcm(self.tp * self.cp, self.tp * self.ep, self.mp)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW of the dense parameters and the schedule that all learning rates follow.

    `schedule` runs from `lr` after `warmup_steps` down to `min_lr` at `decay_steps` (0: at the end of
    the run); `wsd` stays at `lr` and decays linearly over the last `wsd_decay_steps`.
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    wsd_decay_steps: int = 0
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        one_of("optim", self, "schedule", SCHEDULES)
        at_least(
            "optim", self, 0, "lr", "min_lr", "warmup_steps", "decay_steps", "wsd_decay_steps", "weight_decay",
            "clip_grad", "eps",
        )  # fmt: skip
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} exceeds optim.lr={self.lr}; rates decay from lr to min_lr; lower min_lr."
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be in [0, 1); choose such a value.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from.

    Attributes:
        corpus: a built-in corpus made on demand from what is on this machine; it fills `paths`.
        paths: prefixes of Megatron .bin/.idx pairs.
        weights: share of each path in the mix; by default in proportion to their tokens.
        heldout_paths: prefixes that are only evaluated.
        tokenizer: `byte` (256 bytes and an end-of-document token), `hf:PATH_OR_NAME`, `sentencepiece:FILE` or
            `tiktoken:NAME_OR_FILE`, as the data were prepared with.
        cache: directory for built-in corpora.
        trigram_baseline: print the loss of trigram counts beside the held-out loss (small vocabularies).
    """

    corpus: str = ""
    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    heldout_paths: tuple[str, ...] = ()
    tokenizer: str = "byte"
    cache: str = "~/.cache/mempar"
    trigram_baseline: bool = False

    def __post_init__(self) -> None:
        """Check that weights match paths."""
        if self.weights and len(self.weights) != len(self.paths):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} data.paths; each path needs "
                "one; give as many weights as paths, or none."
            )
        if any(not 0 < weight < math.inf for weight in self.weights):
            raise ConfigError(f"data.weights={list(self.weights)} must be positive; drop paths that weigh nothing.")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What computes the operations of memory layers.

    Attributes:
        backend: `triton` (fused kernels), `torch` (torch's operators) or `auto`: triton on CUDA, torch elsewhere. With
            any of them torch scores float64 half keys and runs the exact `adamw`, for which there are no kernels.
        check_indices: look for row ids out of range before every read, to find a defect; the host waits each time.
    """

    backend: str = "auto"
    check_indices: bool = False

    def __post_init__(self) -> None:
        """Check the words."""
        one_of("kernels", self, "backend", BACKENDS)
