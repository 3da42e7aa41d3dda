"""What a rank of the slowest stage sends in a step, collective by collective: bytes, links and time.

Behind the passes it is the stage that takes longest there, as in the time of a step.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mempar.parallel.cost import duplicate_share, exchange_bytes
from mempar.parallel.links import Topology
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Layout
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
from mempar.tools.plan.compute import is_recomputed, network_phase
from mempar.tools.plan.step_time import StepTime

INSIDE, ACROSS = "inside a node", "across nodes"


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of message.

    Attributes:
        name: as in `StepTime.parts`.
        link: which links carry it; the slower one decides.
        sent_bytes: of a rank in a step.
        seconds: in a step.
    """

    name: str
    link: str
    sent_bytes: float
    seconds: float


def traffic_of(layout: Layout, hardware: Hardware, time: StepTime) -> list[Traffic]:
    """All messages of a layout's step, those that take longest first."""
    stage = time.slowest_stage
    sent: dict[str, float] = {}
    links: dict[str, str] = {}
    calls = [
        *_in_passes(layout, stage, time.num_micro_batches),
        *_between_stages(layout, stage, time.num_micro_batches),
        *_behind_passes(layout, time),
    ]
    for each, times in calls:
        sent[each.name] = sent.get(each.name, 0.0) + times * each.sent_bytes
        if times and links.get(each.name) != ACROSS:
            links[each.name] = _link(hardware.topology, each.members)
    for phase, num_bytes, members in _exchanged(layout, stage):
        sent[phase] = sent.get(phase, 0.0) + time.num_micro_batches * num_bytes
        links[phase] = _link(hardware.topology, members)
    found = [
        Traffic(name=name, link=links[name], sent_bytes=num_bytes, seconds=time.parts.get(name, 0.0) / 1e6)
        for name, num_bytes in sent.items()
        if num_bytes
    ]
    return sorted(found, key=lambda each: -each.seconds)


def _in_passes(layout: Layout, stage: int, num_micro_batches: int) -> Iterator[tuple[Collective, int]]:
    """Collectives of the passes of a step, and how often each."""
    train = layout.run.train
    for chunk in layout.chunks_of(stage):
        for block in chunk.blocks:
            around, behind = attention_collectives(layout, stage), mlp_collectives(layout, stage, block)
            for passes, phase in ((around, "attention"), (behind, network_phase(layout.run, block))):
                again = 1 + is_recomputed(train, phase)
                yield from ((each, again * num_micro_batches) for each in passes.forward)
                yield from ((each, num_micro_batches) for each in passes.backward)
        edge = edge_collectives(layout, stage, chunk)
        yield from ((each, num_micro_batches) for each in (*edge.forward, *edge.backward))


def _between_stages(layout: Layout, stage: int, num_micro_batches: int) -> Iterator[tuple[Collective, int]]:
    """Activations to the next stage and gradients to the one before, of each virtual stage.

    The model's last chunk sends no activation, and its first no gradient.
    """
    pp, vpp = layout.grid.pp, layout.run.parallel.vpp
    if pp == 1:
        return
    yield stage_send(layout, stage), num_micro_batches * (vpp - (stage == pp - 1))
    back = stage_send(layout, (stage - 1) % pp)
    yield replace(back, members=back.members[::-1]), num_micro_batches * (vpp - (stage == 0))


def _behind_passes(layout: Layout, time: StepTime) -> Iterator[tuple[Collective, int]]:
    """Collectives behind the passes, each of the stage whose time counts."""
    stage = time.gradients_stage
    yield from ((each, 1) for each in gradient_collectives(layout, stage, dense_bytes(layout, stage)))
    stage = time.update_stage
    yield from ((each, 1) for each in weight_collectives(layout, stage, dense_bytes(layout, stage)))


def _exchanged(layout: Layout, stage: int) -> Iterator[tuple[str, float, Sequence[int]]]:
    """Phases of the memory layers' exchanges of a micro-batch, by the bytes law, reads spread evenly."""
    run, grid = layout.run, layout.grid
    if grid.mp == 1:
        return
    blocks = [block for chunk in layout.chunks_of(stage) for block in chunk.blocks]
    group = memory_group(layout, stage)
    for name, memory in run.memories.items():
        layers, placed = sum(block in memory.layers for block in blocks), layout.placement.memories[name]
        if not layers:
            continue
        reads, tokens, plan = memory.heads * memory.top_k, looked_up(layout), placed.plan
        saved = duplicate_share(heads=memory.heads, top_k=memory.top_k, num_slots=memory.num_slots)
        kept = 1.0 - saved * placed.merge
        shares = [kept * (end - start) / plan.num_slots for start, end in itertools.pairwise(plan.row_cuts)]
        owned = [[round(reads * tokens * share) for share in shares] for _ in range(plan.num_shards)]
        num_bytes = exchange_bytes(
            plan, 0, owned, [tokens] * plan.num_shards, reads=reads, value_bytes=run.value_bytes_of(memory),
            hops=grid.mp_hops, merged=placed.merge, products=memory.variant == "peer",
            recomputed=run.train.runs_memory_again,
        )  # fmt: skip
        for phase, size in vars(num_bytes).items():
            inside, across = group[: grid.mp_rows], group[:: grid.mp_rows]
            members = inside if phase.endswith("_inside") else across if phase.endswith("_across") else group
            yield phase, layers * size, members


def _link(topology: Topology, members: Sequence[int]) -> str:
    return INSIDE if len({topology.node_of(rank) for rank in members}) == 1 else ACROSS
