"""Which pipeline stage a block lies on, and which stages need the table.

Block l of L lies on stage `floor(l / n) mod p` with `n = L / (p v)` blocks in each of the v virtual
stages. Memory layers that share a table co-locate when all their blocks fall on one stage; otherwise
every stage with a memory layer keeps a copy of its shard, and copies are kept equal after each step.
"""

from dataclasses import dataclass, replace

from mempar.errors import ConfigError
from mempar.parallel.cost import columns_send_fewer_bytes
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig

# Tokens of a chosen micro-batch: on two cores a step of the smoke recipe takes .62 s with 1024 tokens at a time,
# .73 s with 512 and 1.4 s with 128 (AMD EPYC, 2026-11); beyond that only its activations grow.
_MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class MemoryPlacement:
    """Where the tables of one memory lie.

    Attributes:
        stages: pipeline stages that hold the tables, ascending.
        plan: their cuts.
        reason: one line that says where they lie and why.
    """

    stages: tuple[int, ...]
    plan: ShardPlan
    reason: str


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The layout of a run on a number of ranks.

    Attributes:
        grid: ranks of every dimension.
        memories: where each memory's tables lie, by the memory's name; empty for a model without any.
        experts: one line that says where experts lie; empty for a model without any.
    """

    grid: RankGrid
    memories: dict[str, MemoryPlacement]
    experts: str = ""

    @property
    def table_stages(self) -> tuple[int, ...]:
        """Stages that hold any table, ascending."""
        return tuple(sorted({stage for memory in self.memories.values() for stage in memory.stages}))

    @property
    def reason(self) -> str:
        """One line that says where the tables and the experts lie and why."""
        parts = [f"{name}: {memory.reason}" for name, memory in self.memories.items()]
        if len(parts) == 1:
            parts = [memory.reason for memory in self.memories.values()]
        parts += [self.experts] if self.experts else []
        return "; ".join(parts) or "dense model, no table"


def stage_of_layer(layer: int, *, num_layers: int, pp: int, vpp: int) -> int:
    """Pipeline stage of a block."""
    return layer // (num_layers // (pp * vpp)) % pp


def place(config: RunConfig, world: int) -> Placement:
    """Lay a run out on `world` ranks.

    Raises:
        ConfigError: when the sizes do not fit the number of ranks, the batch or the table.
    """
    sizes = config.parallel
    if not config.memories and sizes.mp > 1:
        raise ConfigError(
            f"parallel.mp={sizes.mp} with memory.enabled=false: there is no table to cut; use parallel.mp=1."
        )
    rows, why = _row_shards(config)
    grid = RankGrid(world=world, tp=sizes.tp, cp=sizes.cp, pp=sizes.pp, ep=sizes.ep, mp=sizes.mp, mp_rows=rows)
    _check_batch(config, grid)
    memories = {}
    for name, memory in config.memories.items():
        stages = tuple(
            sorted(
                {
                    stage_of_layer(layer, num_layers=config.model.num_layers, pp=sizes.pp, vpp=sizes.vpp)
                    for layer in memory.layers
                }
            )
        )
        plan = ShardPlan(
            num_slots=memory.num_slots,
            value_dim=config.value_dim_of(memory),
            column_tile=memory.column_tile,
            num_row_shards=rows,
            num_column_shards=sizes.mp // rows,
        )
        memories[name] = MemoryPlacement(
            stages=stages, plan=plan, reason=f"{_where(config, memory.layers, stages)}; {why}"
        )
    return Placement(grid=grid, memories=memories, experts=_experts(config))


def with_micro_batch(config: RunConfig, world: int) -> RunConfig:
    """Return the run with its micro-batch size; `train.micro_batch_size=0` becomes the largest that fits.

    It divides each rank's share of the batch, holds at most 1024 tokens (or one sample), and leaves a pipeline
    two micro-batches a stage where the batch has that many.
    """
    train, sizes = config.train, config.parallel
    if train.micro_batch_size:
        return config
    share, rest = divmod(train.global_batch_size * sizes.tp * sizes.cp * sizes.pp, world)
    most = max(1, _MICRO_BATCH_TOKENS // train.seq_length) if not rest else 1
    fits = [
        size
        for size in range(1, most + 1)
        if share % size == 0
        and (sizes.vpp == 1 or share // size % sizes.pp == 0)
        and (sizes.pp == 1 or share // size >= 2 * sizes.pp)
    ]
    return replace(config, train=replace(train, micro_batch_size=max(fits, default=1)))


def _row_shards(config: RunConfig) -> tuple[int, str]:
    mp = config.parallel.mp
    if mp == 1:
        return 1, "one shard"
    if config.parallel.mp_rows:
        rows = config.parallel.mp_rows
        return rows, f"{rows} row x {mp // rows} column shards as set"
    memories = config.memories.values()
    # Summed over the layers, since one grid serves all tables.
    reads = sum(len(memory.layers) * memory.heads * memory.top_k for memory in memories)
    width = sum(len(memory.layers) * config.value_dim_of(memory) for memory in memories)
    layers = sum(len(memory.layers) for memory in memories)
    tiles = min(-(-config.value_dim_of(memory) // memory.column_tile) for memory in memories)
    fewer = columns_send_fewer_bytes(value_dim=width, reads=reads, value_bytes=config.value_bytes)
    read = f"D={width / layers:g}, M={reads / layers:g}"
    if fewer and tiles >= mp:
        return 1, f"{mp} column shards, which send fewer bytes than rows at {read}"
    why = f"only {tiles} column tiles" if fewer else "which send fewer bytes than columns"
    return mp, f"{mp} row shards ({why} at {read})"


def _where(config: RunConfig, layers: tuple[int, ...], stages: tuple[int, ...]) -> str:
    sizes = config.parallel
    if sizes.pp == 1:
        return "table on the only stage"
    if len(stages) == 1:
        return f"table on stage {stages[0]} of {sizes.pp}, where all its layers lie (vpp={sizes.vpp})"
    return (
        f"a copy of the table on each of the stages {', '.join(map(str, stages))}: its layers "
        f"{list(layers)} do not fall on one stage at pp={sizes.pp}, vpp={sizes.vpp}"
    )


def _experts(config: RunConfig) -> str:
    moe, ep = config.moe, config.parallel.ep
    if not moe.enabled:
        return ""
    blocks = ", ".join(map(str, config.moe_layers))
    return f"{moe.num_experts} experts in each of the blocks {blocks}, {moe.num_experts // ep} on each rank (ep={ep})"


def _check_batch(config: RunConfig, grid: RankGrid) -> None:
    train = config.train
    share = train.micro_batch_size * grid.dp
    if train.global_batch_size % share:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size x "
            f"data-parallel size = {train.micro_batch_size} x {grid.dp}; every rank runs equally many "
            f"micro-batches; use a multiple of {share}."
        )
    micro_batches = train.global_batch_size // share
    if config.parallel.vpp > 1 and micro_batches % config.parallel.pp:
        raise ConfigError(
            f"{micro_batches} micro-batches a rank are not a multiple of parallel.pp={config.parallel.pp}; the "
            "interleaved schedule (parallel.vpp > 1) needs that; change train.global_batch_size or parallel.vpp."
        )
