"""The models of "Memory Layers at Scale" (arXiv 2412.09764) as runs: a base, a memory, and GPUs that hold them.

The name of a recipe says all three, and the precision: BASE_MODEL[_SLOTS]_GPUSxGPU_PRECISION. All see 1T tokens.

- **Published**: totals; memory layers (the middle one, or three for Memory+), 1M slots and more, 4 heads of 32 rows,
  keys half as wide as the model; values learn at 1e-3, ten times the dense rate, under the same schedule; PEER with
  N=768; 16, 8, 6 and 4 experts. The published mixtures choose tokens for experts in training ("expert choice") and one
  expert for a token when evaluated. Here tokens choose in training too, one expert each, which costs the same; a
  balancing loss of .01 stands in for the balance that expert choice has by design.
- **Chosen**: rows are updated when they are read (`row_adam`), where the published runs update all in every step.
  Tables are bf16. Up to 16M slots float32 values stand beside them and moments are float32, 14 bytes a value; the table
  of 64M slots rounds stochastically with bf16 moments, 6 bytes a value: .8 instead of 1.9 TB of checkpoint.
- **Layout**: a step of 8M tokens touches nearly every row, so that summed gradients take 4 bytes a value of the
  shard, twice while they are summed, and once more for every holder of the same shard. The larger the table, the more
  ranks share it: row shards inside a node, column shards across nodes with sums in two hops; the largest tables are cut
  over all ranks and have no copies. Records are summed beyond 4 GiB (`memory.deposit_bytes`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mempar.memory.config import MemoryConfig
from mempar.recipes.bases import BASES, TOKENS, Base, steps_of
from mempar.runtime.config import (
    CheckpointConfig,
    DataConfig,
    HardwareConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mempar.runtime.hardware import GPUS

PRECISION = "bf16"
_DEPOSIT_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One entry of the list.

    Attributes:
        base: name of the base model.
        variant: of the memory; or `dense`, or `moe`.
        num_subkeys: N, of a memory.
        gpu: kind of GPU.
        grid: row shards and column shards of the tables.
        ep: expert-parallel size.
    """

    base: str
    variant: str
    num_subkeys: int = 0
    gpu: str = "h100"
    grid: tuple[int, int] = (1, 1)
    ep: int = 1

    @property
    def model_name(self) -> str:
        """What stands between base and hardware in the name."""
        if self.variant == "moe":
            return f"moe{BASES[self.base].experts}"
        return f"{self.variant}_{slots_label(self.num_subkeys**2)}" if self.num_subkeys else self.variant

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return f"{self.base}_{self.model_name}_{BASES[self.base].gpus}x{self.gpu}_{PRECISION}"


def slots_label(num_slots: int) -> str:
    """Number of slots in a name: 1m for 1024 x 1024, 590k for 768 x 768."""
    millions, rest = divmod(num_slots, 1 << 20)
    return f"{millions}m" if not rest else f"{round(num_slots / 1000)}k"


# Of each base up to 1.3b, tables of 1M slots: one node holds the small ones, two nodes that of 1.3b.
_GRIDS = {"134m": (4, 2), "373m": (2, 4), "720m": (2, 4), "1.3b": (8, 2)}
_EXPERT_PARALLEL = {"134m": 8, "373m": 8, "720m": 2, "1.3b": 4}


def _choices() -> list[Choice]:
    found = []
    for base, grid in _GRIDS.items():
        found += [
            Choice(base=base, variant="dense"),
            Choice(base=base, variant="moe", ep=_EXPERT_PARALLEL[base]),
            Choice(base=base, variant="peer", num_subkeys=768, grid=grid),
            Choice(base=base, variant="memory", num_subkeys=1024, grid=grid),
            Choice(base=base, variant="memory_plus", num_subkeys=1024, grid=grid),
        ]
    return [
        *found,
        Choice(base="1.3b", variant="memory_plus", num_subkeys=2048, grid=(8, 4)),
        Choice(base="1.3b", variant="memory_plus", num_subkeys=4096, grid=(8, 8)),
        Choice(base="1.3b", variant="memory_plus", num_subkeys=8192, grid=(8, 8), gpu="h200"),
        Choice(base="8b", variant="dense"),
        Choice(base="8b", variant="memory_plus", num_subkeys=4096, grid=(8, 16)),
    ]


def make_run(choice: Choice) -> RunConfig:
    """Compose a base, a memory and hardware."""
    base = BASES[choice.base]
    batch, length = base.global_batch_size, base.seq_length
    return RunConfig(
        name=choice.name,
        model=base.model,
        memory=_memory(base, choice),
        moe=MoeConfig(num_experts=base.experts, top_k=1, aux_loss=0.01) if choice.variant == "moe" else MoeConfig(),
        parallel=_layout(base, choice),
        optim=OptimConfig(lr=1e-4, min_lr=1e-6, warmup_steps=4000, schedule="linear", weight_decay=0.1, clip_grad=1.0),
        train=TrainConfig(
            steps=steps_of(TOKENS, global_batch_size=batch, seq_length=length),
            global_batch_size=batch,
            seq_length=length,
            micro_batch_size=base.micro_batch_size,
            dtype=PRECISION,
            save_interval=1000,
            log_interval=10,
            # Reported, not rolled back: whether a spike is one is for people to say the first time.
            spike_factor=1.5,
            collective_timeout=1800,
        ),
        data=DataConfig(paths=base.mix.paths, weights=tuple(base.mix.weights.values()), tokenizer=base.mix.tokenizer),
        checkpoint=CheckpointConfig(asynchronous=True),
        hardware=HardwareConfig(gpu=choice.gpu, gpus=base.gpus),
    )


def _memory(base: Base, choice: Choice) -> MemoryConfig:
    if not choice.num_subkeys:
        return MemoryConfig(enabled=False)
    middle, stride = base.middle, base.stride
    plus = choice.variant == "memory_plus"
    narrow = choice.num_subkeys > 4096
    return MemoryConfig(
        variant=choice.variant,
        layers=(middle - stride, middle, middle + stride) if plus else (middle,),
        num_subkeys=choice.num_subkeys,
        key_dim=base.model.hidden_size // 2,
        dtype=PRECISION,
        rounding="stochastic" if narrow else "master",
        moments_dtype=PRECISION if narrow else "float32",
        optimizer="row_adam",
        lr=1e-3,
        deposit_bytes=_DEPOSIT_BYTES,
        usage_interval=1000,
    )


def _layout(base: Base, choice: Choice) -> ParallelConfig:
    rows, columns = choice.grid
    crosses_nodes = rows * columns > GPUS[choice.gpu].gpus_per_node
    return ParallelConfig(
        tp=base.tp,
        sequence_parallel=base.tp > 1,
        ep=choice.ep,
        mp=rows * columns,
        mp_rows=rows,
        mp_hops=2 if crosses_nodes else 1,
        distributed_optimizer=True,
    )


PUBLISHED: dict[str, Callable[[], RunConfig]] = {choice.name: partial(make_run, choice) for choice in _choices()}
