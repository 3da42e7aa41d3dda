"""The configuration of a run: frozen dataclasses, checked when they are created.

A recipe is a function that returns a `RunConfig`; `KEY=VALUE` overrides and YAML files are merged by
`runtime/overrides.py`. Nothing here imports torch, so that planning tools stay light.
"""

from dataclasses import dataclass, field, replace

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.hardware import HardwareConfig
from mempar.runtime.moe_config import MoeConfig, check_experts
from mempar.runtime.sections import (
    SCHEDULES,
    DataConfig,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    one_of,
)
from mempar.runtime.train_config import DTYPES, TrainConfig

__all__ = [
    "DTYPES",
    "SCHEDULES",
    "CheckpointConfig",
    "DataConfig",
    "HardwareConfig",
    "KernelsConfig",
    "MemoryConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
]


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        """Check settings of different sections against each other."""
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise ConfigError(
                f"name={self.name!r} names the run's directory under runs/; it must be one part of a path; use another "
                "name, and --out for another place."
            )
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
        self._check_context_parallel()
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
            one_of(name, memory, "schedule", SCHEDULES)
        dtype = self.table_dtype_of(memory)
        if memory.rounding != "master" and dtype != "bf16":
            raise ConfigError(
                f"{name}.rounding={memory.rounding} with a table in {dtype}: only updates of bf16 values "
                f"are rounded; set {name}.dtype=bf16, or {name}.rounding=master."
            )
        if memory.score_dtype == "bf16" and self.train.dtype == "float64":
            raise ConfigError(
                f"{name}.score_dtype=bf16 with train.dtype=float64: it is for exact comparisons, scores included; "
                f"set {name}.score_dtype=float32, or another train.dtype."
            )
        if memory.moments_dtype == "bf16" and dtype == "float64":
            raise ConfigError(
                f"{name}.moments_dtype=bf16 with a table in float64: moments are rounded from float32; set "
                f"{name}.moments_dtype=float32, or another {name}.dtype."
            )

    def _check_context_parallel(self) -> None:
        cp, length = self.parallel.cp, self.train.seq_length
        tp = self.parallel.tp if self.parallel.sequence_parallel else 1
        if cp > 1 and self.train.trace_steps:
            raise ConfigError(
                f"train.trace_steps={self.train.trace_steps} with parallel.cp={cp}: which positions context-parallel "
                "ranks hold is not recorded; use parallel.cp=1, or train.trace_steps=0."
            )
        if cp > 1 and (length % (2 * cp) or length // cp % tp):
            raise ConfigError(
                f"train.seq_length={length} with parallel.cp={cp}: a sequence is cut into 2*cp = {2 * cp} equal "
                f"chunks, and a rank's two are shared by tp={tp} under sequence parallelism; change one of them."
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

    @property
    def num_gpus(self) -> int:
        """Ranks that the run is meant for."""
        return self.hardware.gpus or self.parallel.smallest_world

    def with_parallel(self, **sizes: int | bool) -> "RunConfig":
        """Return the same run in another parallel layout."""
        return replace(self, parallel=replace(self.parallel, **sizes))
