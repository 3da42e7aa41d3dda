"""The configuration of a run: frozen dataclasses, checked when they are created.

A recipe is a function that returns a `RunConfig`; `KEY=VALUE` overrides and YAML files are merged by
`runtime/overrides.py`. Nothing here imports torch, so that planning tools stay light.
"""

import math
from dataclasses import dataclass, field, replace

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.moe_config import MoeConfig, check_experts

DTYPES = ("float64", "float32", "bf16")
SPIKE_ACTIONS = ("report", "rollback")
SCHEDULES = ("linear", "cosine", "wsd", "constant")
RECOMPUTE = ("none", "selective", "full")
# Parts of a block that `selective` may compute again; the memory layer stands in the place of `mlp`. Of megatron's
# others, `layernorm` breaks without TransformerEngine and the rest are of layers that are not here.
RECOMPUTE_MODULES = ("core_attn", "mlp")


def _at_least(section: str, settings: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{section}.{name}={value} must be at least {minimum}; raise {section}.{name}.")


def _one_of(section: str, settings: object, name: str, choices: tuple[str, ...]) -> None:
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
        _at_least(
            "model", self, 1, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_multiple"
        )
        _at_least("model", self, 0, "num_query_groups", "vocab_size")
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
        _at_least("parallel", self, 1, "tp", "pp", "cp", "ep", "mp")
        _at_least("parallel", self, 0, "vpp", "mp_rows")
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
        _one_of("optim", self, "schedule", SCHEDULES)
        _at_least(
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
class TrainConfig:
    """Length, batch, precision and intervals of a run; intervals are in steps, 0 means never.

    `micro_batch_size=0` takes the largest that the layout allows (see placement.py). A global batch that does
    not divide is filled up with padding (see batch_plan.py). `recompute` trades activations for computing them
    again in backward: all of every block (`full`), or the `recompute_modules` of each (`selective`).

    A step spikes when its loss exceeds `spike_factor` (0: never) times the median of the last `spike_window`
    losses, or when it is the last of `spike_skips` steps in a row that were not finite (see spikes.py).
    `spike_action` then is `report`, or `rollback`: the run goes back to the checkpoint before the spike and on
    with the data after it, at most `spike_max_rollbacks` times.
    """

    steps: int = 100
    seed: int = 1
    global_batch_size: int = 24
    micro_batch_size: int = 1
    seq_length: int = 1024
    dtype: str = "float32"
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("mlp",)
    save_interval: int = 0
    keep_checkpoints: int = 2
    log_interval: int = 1
    heldout_interval: int = 0
    heldout_samples: int = 0
    spike_factor: float = 0.0
    spike_window: int = 100
    spike_skips: int = 5
    spike_action: str = "report"
    spike_max_rollbacks: int = 3
    peak_tflops: float = 0.0
    collective_timeout: int = 600

    def __post_init__(self) -> None:
        """Check ranges."""
        _one_of("train", self, "dtype", DTYPES)
        _at_least("train", self, 1, "global_batch_size", "seq_length", "log_interval")
        _at_least("train", self, 1, "keep_checkpoints", "collective_timeout")
        _at_least("train", self, 0, "steps", "seed", "save_interval", "heldout_interval", "heldout_samples")
        _at_least("train", self, 0, "micro_batch_size", "spike_factor")
        _at_least("train", self, 1, "spike_window", "spike_skips", "spike_max_rollbacks")
        _one_of("train", self, "spike_action", SPIKE_ACTIONS)
        self._check_spikes()
        if self.micro_batch_size > self.global_batch_size:
            raise ConfigError(
                f"train.micro_batch_size={self.micro_batch_size} exceeds train.global_batch_size="
                f"{self.global_batch_size}; the rest would be padding; lower it."
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        _one_of("train", self, "recompute", RECOMPUTE)
        unknown = [name for name in self.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown or (self.recompute == "selective" and not self.recompute_modules):
            raise ConfigError(
                f"train.recompute_modules={list(self.recompute_modules)} with train.recompute={self.recompute}: "
                f"selective recomputation takes some of {', '.join(RECOMPUTE_MODULES)}; name one or more of these."
            )

    @property
    def runs_memory_again(self) -> bool:
        """Whether memory layers are computed again in backward, their exchange included."""
        return self.recompute == "full" or (self.recompute == "selective" and "mlp" in self.recompute_modules)

    def _check_spikes(self) -> None:
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"train.spike_factor={self.spike_factor} would call every other step a spike; it multiplies the median "
                "loss; use a number above 1, or 0 to turn it off."
            )
        if self.spike_action != "rollback":
            return
        if not self.spike_factor or not self.save_interval:
            raise ConfigError(
                f"train.spike_action=rollback with train.spike_factor={self.spike_factor} and train.save_interval="
                f"{self.save_interval}; a rollback needs spikes to be looked for and checkpoints to go back to; set "
                "both, or train.spike_action=report."
            )
        kept_steps = self.save_interval * (self.keep_checkpoints - 1)
        if self.spike_skips - 1 > kept_steps:
            raise ConfigError(
                f"train.spike_skips={self.spike_skips} steps may outlast train.keep_checkpoints="
                f"{self.keep_checkpoints} checkpoints at train.save_interval={self.save_interval}: the last one before "
                f"the spike would be deleted when it is found; keep more checkpoints, or use at most {kept_steps + 1}."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from.

    Attributes:
        corpus: a built-in corpus made on demand from what is on this machine; it fills `paths`.
        paths: prefixes of Megatron .bin/.idx pairs.
        weights: share of each path in the mix; by default in proportion to their tokens.
        heldout_paths: prefixes that are only evaluated.
        tokenizer: `byte` (256 bytes and an end-of-document token).
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
class RunConfig:
    """Everything that defines a run.

    `more_memories` are memories beside `memory`, each with layers and tables of its own, of any size:
    `more_memories=[{layers: [2], num_subkeys: 64}]`.
    """

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(enabled=False))
    more_memories: tuple[MemoryConfig, ...] = ()
    moe: MoeConfig = field(default_factory=MoeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Check settings of different sections against each other."""
        if self.more_memories and not all(memory.enabled for memory in (self.memory, *self.more_memories)):
            raise ConfigError(
                "more_memories with a memory that has enabled=false: more memories stand beside `memory`, and each "
                "is there to be used; enable memory, or drop what is not wanted."
            )
        for name, memory in self.memories.items():
            self._check_memory(name, memory)
        blocks = [block for memory in self.memories.values() for block in memory.layers]
        twice = sorted(block for block in set(blocks) if blocks.count(block) > 1)
        if twice:
            raise ConfigError(
                f"blocks {twice} belong to several memories; "
                "a block reads one memory; change memory.layers or more_memories."
            )
        check_experts(self)
        self._check_tensor_parallel()
        if self.train.dtype == "float64" and self.parallel.distributed_optimizer:
            raise ConfigError(
                "train.dtype=float64 with parallel.distributed_optimizer=true: megatron's distributed optimizer keeps "
                "its state in float32; use float32, or turn the distributed optimizer off."
            )
        layers_per_chunk = self.parallel.pp * max(1, self.parallel.vpp)
        if self.model.num_layers % layers_per_chunk:
            raise ConfigError(
                f"model.num_layers={self.model.num_layers} is not a multiple of parallel.pp x parallel.vpp = "
                f"{self.parallel.pp} x {self.parallel.vpp}; stages hold equally many layers; change one of them."
            )

    def _check_memory(self, name: str, memory: MemoryConfig) -> None:
        model = self.model
        if not memory.layers:
            raise ConfigError(
                f"{name}.enabled=true but {name}.layers is empty; name the blocks, e.g. {name}.layers=[4]."
            )
        if memory.layers[-1] >= model.num_layers or memory.layers[0] < 0:
            raise ConfigError(
                f"{name}.layers={list(memory.layers)} leaves the model's blocks 0 to {model.num_layers - 1} "
                f"(model.num_layers={model.num_layers}); name blocks inside it."
            )
        if memory.variant != "memory_plus" and self.value_dim_of(memory) != model.hidden_size:
            raise ConfigError(
                f"{name}.value_dim={memory.value_dim} differs from model.hidden_size={model.hidden_size}; the variant "
                f"`{memory.variant}` adds values to the residual stream as they are; use 0, or "
                f"{name}.variant=memory_plus."
            )
        if memory.schedule:
            _one_of(name, memory, "schedule", SCHEDULES)
        dtype = self.table_dtype_of(memory)
        if memory.rounding != "master" and dtype != "bf16":
            raise ConfigError(
                f"{name}.rounding={memory.rounding} with a table in {dtype}: only updates of bf16 values "
                f"are rounded; set {name}.dtype=bf16, or {name}.rounding=master."
            )

    def _check_tensor_parallel(self) -> None:
        tp, model = self.parallel.tp, self.model
        sizes = {
            "model.num_attention_heads": model.num_attention_heads,
            "model.num_query_groups": model.query_groups,
            "model.ffn_hidden_size": model.ffn_hidden_size,
            "model.vocab_multiple": model.vocab_multiple,
        }
        if self.moe.enabled and self.moe.ffn_hidden_size:
            sizes["moe.ffn_hidden_size"] = self.moe.ffn_hidden_size
        if self.parallel.sequence_parallel:
            sizes["train.seq_length"] = self.train.seq_length
        for name, size in sizes.items():
            if size % tp:
                raise ConfigError(
                    f"parallel.tp={tp} does not divide {name}={size}; tensor-parallel ranks hold equal shares; "
                    f"change {name} or parallel.tp."
                )

    @property
    def memories(self) -> dict[str, MemoryConfig]:
        """The memories of the model by name: `memory`, then `memory1`, `memory2`, ...; empty for a dense model."""
        if not self.memory.enabled:
            return {}
        return {f"memory{place or ''}": memory for place, memory in enumerate((self.memory, *self.more_memories))}

    def value_dim_of(self, memory: MemoryConfig) -> int:
        """D, the width of a memory's table rows."""
        return memory.value_dim or self.model.hidden_size

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """0-based numbers of the blocks with a memory layer, of whichever memory, ascending."""
        return tuple(sorted(block for memory in self.memories.values() for block in memory.layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based numbers of the blocks whose FFN is replaced by experts."""
        if not self.moe.enabled:
            return ()
        free = (block for block in range(self.model.num_layers) if block not in self.memory_layers)
        return self.moe.layers or tuple(free)

    @property
    def expert_ffn_hidden_size(self) -> int:
        """F, the width of one expert."""
        return self.moe.ffn_hidden_size or self.model.ffn_hidden_size

    def table_dtype_of(self, memory: MemoryConfig) -> str:
        """The dtype of a memory's tables: that of training unless set."""
        return memory.dtype or self.train.dtype

    def value_bytes_of(self, memory: MemoryConfig) -> int:
        """b, bytes of one element of a memory's tables, there and on its way."""
        return {"float64": 8, "float32": 4, "bf16": 2}[self.table_dtype_of(memory)]

    def values_lr_of(self, memory: MemoryConfig) -> float:
        """Peak learning rate of a memory's values: a multiple of the dense one unless set."""
        return memory.lr or memory.lr_multiplier * self.optim.lr

    def values_weight_decay_of(self, memory: MemoryConfig) -> float:
        """Decoupled weight decay of a memory's values: the dense one unless set."""
        return memory.weight_decay if memory.weight_decay >= 0 else self.optim.weight_decay

    def with_parallel(self, **sizes: int | bool) -> "RunConfig":
        """Return the same run in another parallel layout."""
        return replace(self, parallel=replace(self.parallel, **sizes))
