"""What ranks send each other beside the exchange of memory layers: megatron's collectives, and copies of tables.

Stated once, collective by collective; step_time.py adds them up and the simulator plays them. As megatron-core 0.16.1
calls them: without sequence parallelism two all-reduces a block and pass; with it an all-gather before and a
reduce-scatter behind attention and feed-forward network. In backward passes an input is gathered a second time beside
the product that waits for nothing else: that one is left out as hidden. A memory layer's dense parts are whole on every
tensor-parallel rank and take part in none of this, but for its input gradients' kin under tensor parallelism alone:
outputs and score gradients of the shares that each rank looked up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mempar.memory.config import MemoryConfig
from mempar.parallel.collective_time import (
    all_gather_us,
    all_reduce_us,
    even_all_to_all_us,
    reduce_scatter_us,
    send_us,
)
from mempar.parallel.links import Topology
from mempar.runtime.estimate.dense import DenseBytes
from mempar.runtime.estimate.layout import Chunk, Layout
from mempar.runtime.estimate.tables import looked_up
from mempar.tools.plan.update import table_step

_TIMES: dict[str, Callable[[Topology, Sequence[int], float], float]] = {
    "all_reduce": all_reduce_us,
    "all_gather": all_gather_us,
    "reduce_scatter": reduce_scatter_us,
    "all_to_all": even_all_to_all_us,
    "send": lambda topology, members, num_bytes: send_us(topology, members[0], members[-1], num_bytes),
}
# Of the reduction that carries loss, norms and wishes: float64 numbers, few enough that latency is all.
_NUMBERS_BYTES = 128
# Of each token in the loss: its largest logit, its own and the sum of exponentials, in float32.
_LOSS_REDUCTIONS, _LOSS_BYTES = 3, 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one collective.

    Attributes:
        kind: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all` or `send`.
        group: `tp`, `cp`, `ep`, `dp`, `pp`, `copies` or `world`.
        members: world ranks of one group; of a send its source and its target.
        num_bytes: of the whole, as collective_time.py counts: gathered, or before it is scattered; of an all-to-all
            those of a pair.
        count: calls.
        phase: name where it has one of its own in a report; else kind and group say it.
    """

    kind: str
    group: str
    members: Sequence[int]
    num_bytes: float
    count: int = 1
    phase: str = ""

    @property
    def name(self) -> str:
        """As marks and reports name it: `all_reduce/tp`."""
        return self.phase or f"{self.kind}/{self.group}"

    def us(self, topology: Topology) -> float:
        """Microseconds of all calls, one after the other."""
        if len(self.members) < 2 or not self.count:
            return 0.0
        return self.count * _TIMES[self.kind](topology, self.members, self.num_bytes)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a member sends in all calls."""
        others = len(self.members) - 1
        share = {"all_reduce": 2 * others / (others + 1), "all_to_all": others, "send": 1.0}
        return self.count * self.num_bytes * share.get(self.kind, others / (others + 1)) if others else 0.0


@dataclass(frozen=True)
class Passes:
    """Collectives of a forward and of a backward pass of a micro-batch, recomputation left out."""

    forward: list[Collective] = field(default_factory=list)
    backward: list[Collective] = field(default_factory=list)

    def __add__(self, other: "Passes") -> "Passes":
        """Both, one after the other."""
        return Passes(self.forward + other.forward, self.backward + other.backward)


def tensor_group(layout: Layout, stage: int) -> range:
    """The first tensor-parallel group of a stage."""
    first = stage * layout.grid.stage_size
    return range(first, first + layout.grid.tp)


def memory_group(layout: Layout, stage: int) -> range:
    """The first memory-parallel group of a stage."""
    first = stage * layout.grid.stage_size
    return range(first, first + layout.grid.mp)


def attention_collectives(layout: Layout, stage: int) -> Passes:
    """Those around the attention of a block, and what context-parallel ranks send for it."""
    found = _around(layout, stage)
    grid, model = layout.grid, layout.run.model
    if grid.cp > 1:
        first = stage * grid.stage_size
        # A ring: keys and values go round, and in backward their gradients with them.
        head = model.hidden_size // model.num_attention_heads
        num_bytes = 2 * layout.tokens * model.query_groups // grid.tp * head * layout.value_bytes
        members = (first, first + grid.tp)
        ring = Collective(kind="send", group="cp", members=members, num_bytes=num_bytes, count=grid.cp - 1)
        found += Passes([ring], [replace(ring, count=2 * ring.count)])
    return found


def mlp_collectives(layout: Layout, stage: int, block: int) -> Passes:
    """Those of what stands behind a block's attention, the exchange of a memory layer left out."""
    run, memory = layout.run, layout.memory_of(block)
    found = Passes()
    if block in run.moe_layers:
        found += _expert_collectives(layout, stage)
    elif memory is None or memory.beside:
        found += _around(layout, stage)
    if memory is not None:
        found += _token_split(layout, stage, memory)
    return found


def edge_collectives(layout: Layout, stage: int, chunk: Chunk) -> Passes:
    """Those of the embedding and of the output layer, where a chunk has them."""
    if layout.grid.tp == 1:
        return Passes()
    group, whole = tensor_group(layout, stage), _hidden_bytes(layout)
    scattered = layout.num_in_tensor > 1
    found = Passes()
    if chunk.is_first:
        kind = "reduce_scatter" if scattered else "all_reduce"
        out = Collective(kind=kind, group="tp", members=group, num_bytes=whole)
        back = [Collective(kind="all_gather", group="tp", members=group, num_bytes=whole)] if scattered else []
        found += Passes([out], back)
    if chunk.is_last:
        loss = Collective(
            kind="all_reduce", group="tp", members=group, num_bytes=layout.tokens * _LOSS_BYTES, count=_LOSS_REDUCTIONS
        )
        gather = Collective(kind="all_gather", group="tp", members=group, num_bytes=whole)
        reduce = replace(gather, kind="reduce_scatter" if scattered else "all_reduce")
        found += Passes([gather, loss] if scattered else [loss], [reduce])
    return found


def stage_send(layout: Layout, stage: int) -> Collective:
    """An activation, or its gradient, from a stage to the next; from the last one to the first when interleaved."""
    grid = layout.grid
    source, target = stage * grid.stage_size, (stage + 1) % grid.pp * grid.stage_size
    num_bytes = _hidden_bytes(layout) // layout.num_in_tensor
    return Collective(kind="send", group="pp", members=(source, target), num_bytes=num_bytes)


def gradient_collectives(
    layout: Layout, stage: int, dense: DenseBytes, *, with_tables: bool = True
) -> list[Collective]:
    """What follows the last micro-batch and comes before the optimizers: dense gradients, then those of copies.

    Experts' gradients are taken to be reduced over as many ranks as the others: over fewer, by a few percent less.
    """
    grid, run = layout.grid, layout.run
    first = stage * grid.stage_size
    data = range(first, first + grid.stage_size, grid.tp)
    kind = "reduce_scatter" if run.parallel.distributed_optimizer else "all_reduce"
    found = [Collective(kind=kind, group="dp", members=data, num_bytes=dense.gradients)]
    if layout.num_in_tensor > 1:
        whole = _whole_on_every_rank(layout, stage) * layout.wide_bytes
        found.append(Collective(kind="all_reduce", group="tp", members=tensor_group(layout, stage), num_bytes=whole))
    if run.model.tie_embeddings and grid.pp > 1 and stage in (0, grid.pp - 1):
        embedding = run.model.padded_vocab(layout.vocab) // grid.tp * run.model.hidden_size * layout.wide_bytes
        ends = (0, (grid.pp - 1) * grid.stage_size)
        found.append(Collective(kind="all_reduce", group="embedding", members=ends, num_bytes=embedding))
    for name, placed in layout.placement.memories.items():
        if stage not in placed.stages or not with_tables:
            continue
        step, tables = table_step(layout, name, stage), len(run.memories[name].table_names)
        row_bytes = 4 + step.num_columns * max(4, run.value_bytes_of(run.memories[name]))
        copies = grid.copy_groups(placed.stages)[0] if step.copies > 1 else [first]
        # Stages have unequally many layers of a table, and touch unequally many of its rows.
        rows = sum(table_step(layout, name, other).deposits.rows for other in placed.stages)
        num_bytes = grid.stage_size // grid.mp * rows * row_bytes
        found.append(
            Collective(
                kind="all_gather", group="copies", members=copies, num_bytes=num_bytes, count=tables, phase="copy_sync"
            )
        )
    return [each for each in found if len(each.members) > 1]


def weight_collectives(layout: Layout, stage: int, dense: DenseBytes) -> list[Collective]:
    """What comes with the optimizers: the reduction that judges the step, and new weights gathered."""
    grid = layout.grid
    first = stage * grid.stage_size
    found = [Collective(kind="all_reduce", group="world", members=range(grid.world), num_bytes=_NUMBERS_BYTES)]
    if layout.run.parallel.distributed_optimizer:
        data = range(first, first + grid.stage_size, grid.tp)
        found.append(Collective(kind="all_gather", group="dp", members=data, num_bytes=dense.weights))
    return [each for each in found if len(each.members) > 1]


def _hidden_bytes(layout: Layout) -> int:
    """Of a micro-batch's activations between blocks, on all tensor-parallel ranks together."""
    return layout.tokens * layout.run.model.hidden_size * layout.value_bytes


def _around(layout: Layout, stage: int) -> Passes:
    """Around a part of a block that tensor-parallel ranks share."""
    if layout.grid.tp == 1:
        return Passes()
    whole = Collective(
        kind="all_reduce", group="tp", members=tensor_group(layout, stage), num_bytes=_hidden_bytes(layout)
    )
    if layout.num_in_tensor == 1:
        return Passes([whole], [whole])
    both = [replace(whole, kind="all_gather"), replace(whole, kind="reduce_scatter")]
    return Passes(both, both)


def _expert_collectives(layout: Layout, stage: int) -> Passes:
    """Tokens sent to their experts and back, gathered over tensor-parallel ranks, each of which has a part of them."""
    grid, run = layout.grid, layout.run
    first = stage * grid.stage_size
    chosen = layout.own_tokens * run.moe.top_k * run.model.hidden_size * layout.value_bytes
    found = Passes()
    if grid.ep > 1:
        members = range(first, first + grid.ep * grid.tp, grid.tp)
        trip = Collective(kind="all_to_all", group="ep", members=members, num_bytes=chosen / grid.ep, count=2)
        found += Passes([trip], [trip])
    if grid.tp > 1:
        gather = Collective(
            kind="all_gather", group="tp", members=tensor_group(layout, stage), num_bytes=chosen * grid.tp
        )
        both = [gather, replace(gather, kind="reduce_scatter")]
        found += Passes(both, both)
    return found


def _token_split(layout: Layout, stage: int, memory: MemoryConfig) -> Passes:
    """Without sequence parallelism: what each tensor-parallel rank looked up, and score gradients back."""
    grid, run = layout.grid, layout.run
    if grid.tp == 1 or layout.num_in_tensor > 1:
        return Passes()
    reads, value_bytes = memory.heads * memory.top_k, run.value_bytes_of(memory)
    peer = memory.variant == "peer"
    group, tokens = tensor_group(layout, stage), looked_up(layout) * grid.tp
    outputs = tokens * value_bytes * (run.value_dim_of(memory) + (reads if peer else 0))
    scores = tokens * (layout.wide_bytes * reads + (value_bytes * run.value_dim_of(memory) if peer else 0))
    gather = Collective(kind="all_gather", group="tp", members=group, num_bytes=outputs, phase="token_gather")
    return Passes([gather], [replace(gather, num_bytes=scores, phase="score_gather")])


def _whole_on_every_rank(layout: Layout, stage: int) -> int:
    """Parameters whose gradients tensor-parallel ranks add up under sequence parallelism: norms, memory layers."""
    run, width = layout.run, layout.run.model.hidden_size
    total = 0
    for chunk in layout.chunks_of(stage):
        for block in chunk.blocks:
            total += 2 * width
            memory = layout.memory_of(block)
            if memory is None:
                continue
            total += memory.heads * (2 * memory.num_subkeys * memory.half_key_dim + (width + 1) * memory.key_dim)
            total += 2 * width * run.value_dim_of(memory) if memory.variant == "memory_plus" else 0
    return total
