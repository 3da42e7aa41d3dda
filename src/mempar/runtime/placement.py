"""Which pipeline stage a block lies on, and which stages need the table.

Block l of L lies on stage `floor(l / n) mod p` with `n = L / (p v)` blocks in each of the v virtual
stages. Memory layers that share a table co-locate when all their blocks fall on one stage; otherwise
every stage with a memory layer keeps a copy of its shard, and copies are kept equal after each step.
`resolve` fills in what a run leaves to its layout, `place` lays the resolved run out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import columns_send_fewer_bytes, duplicate_share, merging_pays
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig
from mempar.runtime.data.batch_plan import plan_batch

# Tokens of a chosen micro-batch: on two cores a step of the smoke recipe takes .62 s with 1024 tokens at a time,
# .73 s with 512 and 1.4 s with 128 (AMD EPYC, 2026-11); beyond that only its activations grow.
_MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class MemoryPlacement:
    """Where the tables of one memory lie.

    Attributes:
        stages: pipeline stages that hold the tables, ascending.
        plan: their cuts.
        merge: whether reads of a token that chose the same slot travel as one.
        reason: one line that says where they lie and why.
    """

    stages: tuple[int, ...]
    plan: ShardPlan
    merge: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The layout of a run on a number of ranks.

    Attributes:
        grid: ranks of every dimension.
        memories: where each memory's tables lie, by the memory's name; empty for a model without any.
        experts: one line that says where experts lie; empty for a model without any.
        num_padding: samples that are computed in a step beside those of the global batch, and do not count.
    """

    grid: RankGrid
    memories: dict[str, MemoryPlacement]
    experts: str = ""
    num_padding: int = 0

    @property
    def table_stages(self) -> tuple[int, ...]:
        """Stages that hold any table, ascending."""
        return tuple(sorted({stage for memory in self.memories.values() for stage in memory.stages}))

    @property
    def reason(self) -> str:
        """One line that says where the tables and the experts lie and why, and what is computed in vain."""
        reasons = [
            memory.reason if len(self.memories) == 1 else f"{name}: {memory.reason}"
            for name, memory in self.memories.items()
        ]
        reasons += [self.experts] if self.experts else []
        padding = [f"{self.num_padding} samples of padding a step"] if self.num_padding else []
        return "; ".join((reasons or ["dense model, no table"]) + padding)


def stage_of_layer(layer: int, *, num_layers: int, pp: int, vpp: int) -> int:
    """Pipeline stage of a block."""
    return layer // (num_layers // (pp * vpp)) % pp


def stages_of_layers(layers: tuple[int, ...], *, num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """Pipeline stages that some blocks lie on, ascending."""
    return tuple(sorted({stage_of_layer(layer, num_layers=num_layers, pp=pp, vpp=vpp) for layer in layers}))


def colocating_vpp(memories: Iterable[tuple[int, ...]], *, num_layers: int, pp: int) -> int | None:
    """Return the fewest virtual stages that put the layers of every memory on one pipeline stage.

    Args:
        memories: the layers of each memory.
        num_layers: L, a multiple of p * v.
        pp: p.

    Returns:
        v; None when no number does.
    """
    memories = list(memories)
    for vpp in range(1, num_layers // pp + 1):
        if num_layers % (pp * vpp) == 0 and all(
            len(stages_of_layers(layers, num_layers=num_layers, pp=pp, vpp=vpp)) == 1 for layers in memories
        ):
            return vpp
    return None


def place(config: RunConfig, world: int) -> Placement:
    """Lay a resolved run out on `world` ranks.

    Raises:
        ConfigError: when the sizes do not fit the number of ranks or the table.
    """
    sizes = config.parallel
    assert sizes.vpp and config.train.micro_batch_size, "the run was not resolved"
    if not config.memories and sizes.mp > 1:
        raise ConfigError(
            f"parallel.mp={sizes.mp} with memory.enabled=false: there is no table to cut; use parallel.mp=1."
        )
    rows, why = _row_shards(config)
    grid = RankGrid(
        world=world,
        tp=sizes.tp,
        cp=sizes.cp,
        pp=sizes.pp,
        ep=sizes.ep,
        mp=sizes.mp,
        mp_rows=rows,
        mp_hops=sizes.mp_hops,
    )
    memories = {}
    for name, memory in config.memories.items():
        stages = stages_of_layers(memory.layers, num_layers=config.model.num_layers, pp=sizes.pp, vpp=sizes.vpp)
        plan = ShardPlan(
            num_slots=memory.num_slots,
            value_dim=config.value_dim_of(memory),
            column_tile=memory.column_tile,
            num_row_shards=rows,
            num_column_shards=sizes.mp // rows,
        )
        merge, how = _merging(memory, plan)
        reason = f"{_where(config, memory.layers, stages, grid.dp)}; {why}{how}"
        memories[name] = MemoryPlacement(stages=stages, plan=plan, merge=merge, reason=reason)
    num_padding = plan_batch(config, grid.dp).num_padding
    return Placement(grid=grid, memories=memories, experts=_experts(config), num_padding=num_padding)


def resolve(config: RunConfig, world: int) -> RunConfig:
    """Return the run with what its layout decides: virtual stages and micro-batch size, where they were left open."""
    sizes = config.parallel
    dp = max(1, world // (sizes.tp * sizes.cp * sizes.pp))
    if sizes.vpp:
        return _with_micro_batch(config, dp)
    plain = _with_micro_batch(config.with_parallel(vpp=1), dp)
    layers = [memory.layers for memory in config.memories.values()]
    vpp = colocating_vpp(layers, num_layers=config.model.num_layers, pp=sizes.pp)
    if vpp is None or vpp == 1:
        return plain
    together = _with_micro_batch(config.with_parallel(vpp=vpp), dp)
    # Interleaving takes multiples of pp micro-batches: computing padding costs more than keeping copies equal.
    more_padding = plan_batch(together, dp).num_padding > plan_batch(plain, dp).num_padding
    return plain if more_padding else together


def _with_micro_batch(config: RunConfig, dp: int) -> RunConfig:
    """Return the run with its micro-batch size; `train.micro_batch_size=0` becomes the largest that fits.

    It adds no padding to what single samples need, holds at most 1024 tokens (or one sample), and leaves a
    pipeline two micro-batches a stage where the batch has that many.
    """
    train, pp = config.train, config.parallel.pp
    if train.micro_batch_size:
        return config
    most = min(train.global_batch_size, max(1, _MICRO_BATCH_TOKENS // train.seq_length))
    tried = [replace(config, train=replace(train, micro_batch_size=size)) for size in range(1, most + 1)]
    plans = [plan_batch(run, dp) for run in tried]
    fits = [
        run
        for run, plan in zip(tried, plans, strict=True)
        if plan.num_padding <= plans[0].num_padding and (pp == 1 or plan.num_micro_batches >= 2 * pp)
    ]
    return fits[-1] if fits else tried[0]


def _row_shards(config: RunConfig) -> tuple[int, str]:
    mp = config.parallel.mp
    if mp == 1:
        return 1, "one shard"
    if config.parallel.mp_rows:
        rows = config.parallel.mp_rows
        hops = "" if rows in (1, mp) else ", two hops" if config.parallel.mp_hops == 2 else ", one hop"
        return rows, f"{rows} row x {mp // rows} column shards as set{hops}"
    memories = config.memories.values()
    # Summed over the layers, since one grid serves all tables.
    reads = sum(len(memory.layers) * memory.heads * memory.top_k for memory in memories)
    width = sum(len(memory.layers) * config.value_dim_of(memory) for memory in memories)
    layers = sum(len(memory.layers) for memory in memories)
    tiles = min(-(-config.value_dim_of(memory) // memory.column_tile) for memory in memories)
    # Tables of other widths of numbers are judged as the first.
    value_bytes = config.value_bytes_of(config.memory)
    fewer = columns_send_fewer_bytes(value_dim=width, reads=reads, value_bytes=value_bytes)
    read = f"D={width / layers:g}, M={reads / layers:g}"
    if fewer and tiles >= mp:
        return 1, f"{mp} column shards, which send fewer bytes than rows at {read}"
    why = f"only {tiles} column tiles" if fewer else "which send fewer bytes than columns"
    return mp, f"{mp} row shards ({why} at {read})"


def _merging(memory: MemoryConfig, plan: ShardPlan) -> tuple[bool, str]:
    if plan.num_shards == 1:
        return False, ""
    if memory.merge_duplicates != "auto":
        merge = memory.merge_duplicates == "on"
        return merge, "; duplicate reads merged as set" if merge else ""
    reads = {"heads": memory.heads, "top_k": memory.top_k, "num_slots": memory.num_slots}
    share = duplicate_share(**reads)
    merge = merging_pays(**reads, value_dim=plan.value_dim, num_row_shards=plan.num_row_shards)
    return merge, f"; duplicate reads ({share:.0%} expected) merged" if merge else ""


def _where(config: RunConfig, layers: tuple[int, ...], stages: tuple[int, ...], dp: int) -> str:
    sizes = config.parallel
    if sizes.pp == 1:
        return "table on the only stage"
    if len(stages) == 1:
        return f"table on stage {stages[0]} of {sizes.pp}, where all its layers lie (vpp={sizes.vpp})"
    copies = (
        f"a copy of the table on each of the stages {', '.join(map(str, stages))}: its layers "
        f"{list(layers)} do not fall on one stage at pp={sizes.pp}, vpp={sizes.vpp}"
    )
    vpp = colocating_vpp([layers], num_layers=config.model.num_layers, pp=sizes.pp)
    if vpp is None:
        return f"{copies}, nor at any vpp"
    padding = plan_batch(config.with_parallel(vpp=vpp), dp).num_padding
    return f"{copies}; they would at parallel.vpp={vpp}" + (f", with {padding} samples of padding" if padding else "")


def _experts(config: RunConfig) -> str:
    moe, ep = config.moe, config.parallel.ep
    if not moe.enabled:
        return ""
    blocks = ", ".join(map(str, config.moe_layers))
    return f"{moe.num_experts} experts in each of the blocks {blocks}, {moe.num_experts // ep} on each rank (ep={ep})"
