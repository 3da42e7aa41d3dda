"""How long a step takes: compute, communication and waiting added up, stage by stage.

    step = pipeline + sends + gradients + update
    pipeline = m max(t_s) + (sum of t_s - max(t_s)) / v        m micro-batches, v virtual stages, t_s a stage's passes
    sends    = 2 (m + p - 1) sends in 1F1B; 2 (p - 1) where interleaved stages send beside their work
    gradients, update = the slowest stage before and after the one reduction that all ranks wait for

Equal stages make that m t + (p - 1) t / v, the bubble of 1F1B (v = 1) and of interleaving (arXiv 2104.04473). Nothing
else overlaps: what a stage computes and what it sends in its passes are added, as the engine does one after the other
(no reduction beside the backward pass, no exchange beside projections). Every rank is taken to be as fast as any other
and reads to fall evenly on row shards.
"""

from collections import Counter
from dataclasses import dataclass

from mempar.parallel.cost import duplicate_share
from mempar.parallel.exchange_time import ExchangeUs, even_exchange_us
from mempar.parallel.links import Topology
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Chunk, Layout
from mempar.runtime.estimate.tables import looked_up
from mempar.runtime.hardware import Hardware
from mempar.tools.plan.communication import (
    Collective,
    attention_collectives,
    edge_collectives,
    gradient_collectives,
    memory_group,
    mlp_collectives,
    stage_send,
    weight_collectives,
)
from mempar.tools.plan.compute import MEMORY_PHASES, block_compute_us, head_compute_us, is_recomputed, network_phase
from mempar.tools.plan.update import update_compute_us

# Waiting, what is computed again, and the output layer.
BUBBLE, AGAIN, HEAD = "bubble", "recomputed", "head"
# Parts that are arithmetic and memory; what is neither these nor waiting is communication.
COMPUTE = frozenset({
    "norms", "attention", "core_attn", "mlp", "experts", *MEMORY_PHASES, "gradient_sums", AGAIN, HEAD, "reduce_rows",
    "row_update", "dense_update",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step's time and what it is made of.

    Attributes:
        parts: microseconds by phase of what adds up to the step: of the slowest stage in its passes.
        stage_us: a micro-batch's forward and backward pass on each stage.
        num_micro_batches: m.
        gradients_stage: the stage that takes longest before the reduction that all ranks wait for, and
        update_stage: behind it; theirs are the parts behind the passes.
    """

    parts: dict[str, float]
    stage_us: tuple[float, ...]
    num_micro_batches: int
    gradients_stage: int
    update_stage: int

    @property
    def seconds(self) -> float:
        """The step."""
        return sum(self.parts.values()) / 1e6

    @property
    def slowest_stage(self) -> int:
        """The stage that the others wait for."""
        return self.stage_us.index(max(self.stage_us))

    @property
    def communication(self) -> dict[str, float]:
        """The parts that are neither compute nor waiting, in microseconds."""
        return {name: us for name, us in self.parts.items() if name != BUBBLE and name not in COMPUTE}

    @property
    def by_sort(self) -> dict[str, float]:
        """Seconds of compute, communication and waiting."""
        sums = {"compute": 0.0, "communication": 0.0, BUBBLE: 0.0}
        for name, us in self.parts.items():
            sums[name if name == BUBBLE else "compute" if name in COMPUTE else "communication"] += us / 1e6
        return sums


# Parts of blocks without memories, by where their stage begins in a node and by block: equal in layouts that differ in
# the cut of their tables alone.
Known = dict[tuple[int, int], dict[str, float]]


def step_time(layout: Layout, hardware: Hardware, *, with_tables: bool = True, known: Known | None = None) -> StepTime:
    """Predict a step of a layout.

    Args:
        layout: a run on some ranks.
        hardware: what each rank is.
        with_tables: whether tables are exchanged, summed and updated; False for a bound from below on any cut of them.
        known: what is known of blocks from layouts that differ in the cut of their tables alone; added to.
    """
    clock = _Clock(layout, hardware, with_tables=with_tables, known={} if known is None else known)
    stages = [clock.stage(stage) for stage in range(layout.grid.pp)]
    totals = [sum(stage.passes.values()) for stage in stages]
    slowest, m = totals.index(max(totals)), layout.batch.num_micro_batches
    parts = {name: m * us for name, us in stages[slowest].passes.items()}
    if layout.grid.pp > 1:
        pp, vpp = layout.grid.pp, layout.run.parallel.vpp
        parts[BUBBLE] = (sum(totals) - totals[slowest]) / vpp
        send = max(stage_send(layout, stage).us(clock.topology) for stage in range(pp - 1))
        parts["send/pp"] = 2 * send * ((m + pp - 1) if vpp == 1 else (pp - 1))
    gradients = max(range(len(stages)), key=lambda stage: sum(stages[stage].gradients.values()))
    update = max(range(len(stages)), key=lambda stage: sum(stages[stage].update.values()))
    _add(parts, stages[gradients].gradients)
    _add(parts, stages[update].update)
    return StepTime(
        parts={name: us for name, us in parts.items() if us},
        stage_us=tuple(totals),
        num_micro_batches=m,
        gradients_stage=gradients,
        update_stage=update,
    )


def exchange_of(layout: Layout, name: str, stage: int, topology: Topology) -> ExchangeUs:
    """Time of one layer's exchange of a memory, in a micro-batch, recomputation included."""
    run, placed = layout.run, layout.placement.memories[name]
    memory = run.memories[name]
    return even_exchange_us(
        topology,
        placed.plan,
        memory_group(layout, stage),
        looked_up(layout),
        reads=memory.heads * memory.top_k,
        value_bytes=run.value_bytes_of(memory),
        duplicate_share=duplicate_share(heads=memory.heads, top_k=memory.top_k, num_slots=memory.num_slots),
        hops=layout.grid.mp_hops,
        merged=placed.merge,
        products=memory.variant == "peer",
        recomputed=run.train.runs_memory_again,
    )


@dataclass(frozen=True)
class _Stage:
    """Parts of a stage: of one micro-batch's passes, before the reduction that every rank waits for, and behind it."""

    passes: dict[str, float]
    gradients: dict[str, float]
    update: dict[str, float]


class _Clock:
    """Times of stages, of which those that hold the same kinds of blocks and lie alike on nodes are looked at once."""

    def __init__(self, layout: Layout, hardware: Hardware, *, with_tables: bool, known: Known) -> None:
        self.layout, self.hardware, self.topology = layout, hardware, hardware.topology
        self.with_tables, self.known = with_tables, known
        self._stages: dict[tuple[object, ...], _Stage] = {}

    def stage(self, stage: int) -> _Stage:
        chunks = self.layout.chunks_of(stage)
        like = self.layout.like
        kinds = Counter([like[block] for chunk in chunks for block in chunk.blocks])
        edges = [chunk for chunk in chunks if chunk.is_first or chunk.is_last]
        place = stage * self.layout.grid.stage_size % self.topology.ranks_per_node
        key = (place, *sorted(kinds.items()), *((each.is_first, each.is_last) for each in edges))
        if key not in self._stages:
            self._stages[key] = _Stage(self._passes(stage, place, kinds, edges), *self._after_passes(stage))
        return self._stages[key]

    def _passes(self, stage: int, place: int, kinds: "Counter[int]", edges: list[Chunk]) -> dict[str, float]:
        parts: dict[str, float] = {}
        for block, number in kinds.items():
            _add(parts, self._block(stage, place, block), number)
        for chunk in edges:
            passes = edge_collectives(self.layout, stage, chunk)
            self._send(parts, [*passes.forward, *passes.backward])
            if chunk.is_last:
                head = head_compute_us(self.layout.run, self.layout, self.hardware).total
                parts[HEAD] = parts.get(HEAD, 0.0) + head
        return parts

    def _block(self, stage: int, place: int, block: int) -> dict[str, float]:
        if self.layout.memory_of(block) is not None:
            return self._block_parts(stage, block)
        if (place, block) not in self.known:
            self.known[place, block] = self._block_parts(stage, block)
        return self.known[place, block]

    def _block_parts(self, stage: int, block: int) -> dict[str, float]:
        layout, run = self.layout, self.layout.run
        parts: dict[str, float] = {AGAIN: 0.0}
        for phase, us in block_compute_us(run, layout, block, self.hardware).items():
            parts[phase] = us.total
            parts[AGAIN] += us.forward * is_recomputed(run.train, phase)
        around, behind = attention_collectives(layout, stage), mlp_collectives(layout, stage, block)
        self._send(parts, [*around.forward, *around.backward, *behind.forward, *behind.backward])
        self._send(parts, around.forward * is_recomputed(run.train, "attention"))
        self._send(parts, behind.forward * is_recomputed(run.train, network_phase(run, block)))
        name = next((name for name, memory in run.memories.items() if block in memory.layers), None)
        if name is not None and self.with_tables and layout.grid.mp > 1:
            exchange = exchange_of(layout, name, stage, self.topology)
            _add(parts, {phase: us for phase, us in vars(exchange).items() if phase not in ("forward", "backward")})
        return parts

    def _after_passes(self, stage: int) -> tuple[dict[str, float], dict[str, float]]:
        """Parts before and after the reduction that every rank waits for."""
        layout = self.layout
        dense = dense_bytes(layout, stage)
        gradients = update_compute_us(layout.run, layout, stage, dense, self.hardware, with_tables=self.with_tables)
        update = {name: gradients.pop(name) for name in ("row_update", "dense_update") if name in gradients}
        self._send(gradients, gradient_collectives(layout, stage, dense, with_tables=self.with_tables))
        self._send(update, weight_collectives(layout, stage, dense))
        return gradients, update

    def _send(self, parts: dict[str, float], collectives: list[Collective]) -> None:
        for each in collectives:
            parts[each.name] = parts.get(each.name, 0.0) + each.us(self.topology)


def _add(parts: dict[str, float], more: dict[str, float], times: float = 1.0) -> None:
    for name, us in more.items():
        parts[name] = parts.get(name, 0.0) + times * us
