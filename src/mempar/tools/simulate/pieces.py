"""What a pass of a chunk is made of: computing and collectives, one after the other, with their times.

The same times as the planner's closed form (tools/plan/step_time.py) adds up, put in the order in which the engine
computes and sends; phases are named as marks and reports name them. What a rank asks of row shards is marked with
`load`: where reads do not fall evenly, step.py prices it anew for each micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mempar.parallel.cost import INDEX_BYTES, duplicate_share
from mempar.parallel.exchange_time import ExchangeUs, even_exchange_us
from mempar.parallel.links import Topology
from mempar.runtime.estimate.layout import Chunk, Layout
from mempar.runtime.estimate.tables import looked_up
from mempar.runtime.hardware import Hardware
from mempar.tools.plan.communication import (
    Collective,
    attention_collectives,
    edge_collectives,
    memory_group,
    mlp_collectives,
)
from mempar.tools.plan.compute import block_compute_us, head_compute_us, is_recomputed, network_phase
from mempar.tools.simulate.groups import NodePlacements
from mempar.tools.simulate.loads import memory_of

_ATTENTION = ("norms", "attention", "core_attn")
_NETWORK = ("mlp", "experts")


@dataclass(frozen=True)
class Piece:
    """One task of a pass.

    Attributes:
        phase: its name.
        us: microseconds, of reads that fall evenly.
        group: whose members meet for it; empty for computing.
        block: 0-based number of the block; -1 outside of blocks.
        load: `entries`, `weights`, `score_grads` or `gather` where the time depends on who owns the rows.
        inside_bytes: what a rank sends inside its node.
        across_bytes: and to other nodes.
    """

    phase: str
    us: float
    group: str = ""
    block: int = -1
    load: str = ""
    inside_bytes: float = 0.0
    across_bytes: float = 0.0


@dataclass(frozen=True)
class PassPieces:
    """Of a forward and of a backward pass, each in order; what is computed again stands in the latter."""

    forward: list[Piece]
    backward: list[Piece]


class PieceMaker:
    """Makes the pieces of chunks of a layout."""

    def __init__(self, layout: Layout, hardware: Hardware, topology: Topology) -> None:
        self.layout, self.hardware, self.topology = layout, hardware, topology
        self.placements = NodePlacements(layout, topology)

    def chunk(self, stage: int, chunk: Chunk) -> PassPieces:
        """Pieces of a chunk's passes of one micro-batch."""
        run = self.layout.run
        edges = edge_collectives(self.layout, stage, chunk)
        # Those of the embedding stand first in the forward pass, those of the output layer last.
        heads = edge_collectives(self.layout, stage, replace(chunk, is_first=False))
        embeds_forward = edges.forward[: len(edges.forward) - len(heads.forward)]
        embeds_backward = edges.backward[: len(edges.backward) - len(heads.backward)]
        forward, backward = self.collectives(embeds_forward), self.collectives(embeds_backward)
        for block in chunk.blocks:
            pieces = self.block(stage, block)
            forward, backward = forward + pieces.forward, pieces.backward + backward
        if chunk.is_last:
            head = head_compute_us(run, self.layout, self.hardware)
            forward = forward + _around(Piece("head", head.forward), self.collectives(heads.forward))
            backward = [Piece("head_backward", head.backward), *self.collectives(heads.backward), *backward]
        return PassPieces(forward, backward)

    def block(self, stage: int, block: int) -> PassPieces:
        """Pieces of one block."""
        run = self.layout.run
        sections = [self._attention(stage, block), self._network(stage, block)]
        forward = [piece for section in sections for piece in section.forward]
        if run.train.recompute == "full":
            return PassPieces(forward, forward + sections[1].backward + sections[0].backward)
        again = [[piece for piece in section.forward if self._runs_again(piece)] for section in sections]
        return PassPieces(forward, again[1] + sections[1].backward + again[0] + sections[0].backward)

    def collectives(self, found: Sequence[Collective]) -> list[Piece]:
        """Pieces of megatron's collectives."""
        pieces = []
        for each in found:
            crossing = self.placements.crossing(each.group, each.members, ring=each.kind != "all_to_all")
            pieces.append(
                Piece(
                    each.name,
                    self.collective_us(each),
                    each.group,
                    inside_bytes=each.sent_bytes * (1 - crossing),
                    across_bytes=each.sent_bytes * crossing,
                )
            )
        return [piece for piece in pieces if piece.us or piece.across_bytes or piece.inside_bytes]

    def collective_us(self, collective: Collective) -> float:
        """Microseconds of a collective in the slowest of its groups."""

        def group_us(members: Sequence[int]) -> float:
            return replace(collective, members=members).us(self.topology)

        return group_us(self.placements.slowest(collective.group, collective.members, group_us))

    def _runs_again(self, piece: Piece) -> bool:
        """Whether selective recomputation repeats a piece of a forward pass."""
        train = self.layout.run.train
        if piece.phase in (*_ATTENTION, *_NETWORK):
            return is_recomputed(train, piece.phase)
        return is_recomputed(train, "attention" if piece.block < 0 else network_phase(self.layout.run, piece.block))

    def _attention(self, stage: int, block: int) -> PassPieces:
        times = block_compute_us(self.layout.run, self.layout, block, self.hardware)
        found = attention_collectives(self.layout, stage)
        forward, backward = (self.collectives(side) for side in (found.forward, found.backward))
        norms, projections, core = (times[phase] for phase in _ATTENTION)
        first = [Piece("norms", norms.forward), Piece("attention", projections.forward)]
        core_backward = [
            Piece("core_attn_backward", core.backward),
            Piece("attention_backward", projections.backward),
            Piece("norms_backward", norms.backward),
            Piece("gradient_sums", times["gradient_sums"].backward),
        ]
        return PassPieces(
            _around_all([*first, Piece("core_attn", core.forward)], forward), _around_all(core_backward, backward)
        )

    def _network(self, stage: int, block: int) -> PassPieces:
        """What stands behind the attention: a feed-forward network, experts, a memory layer, or two of these."""
        layout = self.layout
        times = block_compute_us(layout.run, layout, block, self.hardware)
        found = mlp_collectives(layout, stage, block)
        forward, backward = (
            [replace(piece, block=block) for piece in self.collectives(side)]
            for side in (found.forward, found.backward)
        )
        dense_forward = [Piece(phase, times[phase].forward, block=block) for phase in _NETWORK if phase in times]
        dense_backward = [
            Piece(f"{phase}_backward", times[phase].backward, block=block) for phase in _NETWORK if phase in times
        ]
        shared = [[piece for piece in side if piece.phase not in _SHARES] for side in (forward, backward)]
        memory = self._memory(stage, block, *([p for p in side if p.phase in _SHARES] for side in (forward, backward)))
        return PassPieces(
            _around_all(dense_forward, shared[0]) + memory.forward,
            memory.backward + _around_all(dense_backward, shared[1]),
        )

    def _memory(self, stage: int, block: int, gathers: list[Piece], score_gathers: list[Piece]) -> PassPieces:
        if self.layout.memory_of(block) is None:
            return PassPieces([], [])
        times = block_compute_us(self.layout.run, self.layout, block, self.hardware)
        out, back, again_out, again_back = self._exchange(stage, block)

        is_cut = self.layout.placement.memories[memory_of(self.layout, block)[0]].plan.num_row_shards > 1

        def computed(*phases: str, suffix: str = "") -> list[Piece]:
            return [
                Piece(
                    phase + suffix,
                    times[phase].backward if suffix else times[phase].forward,
                    block=block,
                    load="gather" if phase == "gather" and is_cut else "",
                )
                for phase in phases
                if phase in times
            ]

        forward = computed("query", "topk", "route") + out + computed("gather") + back + gathers + computed("gate")
        gate, gather = computed("gate", suffix="_backward"), computed("gather", suffix="_backward")
        chosen = computed("topk", "query", suffix="_backward")
        return PassPieces(forward, gate + again_out + gather + again_back + score_gathers + chosen)

    def _exchange(self, stage: int, block: int) -> tuple[list[Piece], list[Piece], list[Piece], list[Piece]]:
        """Collectives before and behind the owners' work, in a forward and in a backward pass."""
        layout, (name, memory) = self.layout, memory_of(self.layout, block)
        if layout.grid.mp == 1:
            return [], [], [], []
        us = self._exchange_us(stage, name)
        peer = memory.variant == "peer"
        # A product travels as the backward pass of a read does, and its backward pass as a read.
        times = 2 if peer else 1
        values = [(phase, getattr(us, phase) / times) for phase in ("values", "values_inside", "values_across")]
        outward = ("output_grads", "output_grads_across", "output_grads_inside")
        grads = [(phase, getattr(us, phase) / times) for phase in outward]
        scores = us.score_grads / times
        products = scores + sum(each for _, each in grads) if peer else 0.0
        entries = us.forward - us.split_sizes - sum(each for _, each in values) - products

        def piece(phase: str, microseconds: float, load: str = "") -> Piece:
            return self._exchange_piece(stage, block, phase, microseconds, load)

        def pieces(found: list[tuple[str, float]]) -> list[Piece]:
            return [piece(phase, microseconds) for phase, microseconds in found if microseconds]

        score_piece = piece("score_grads", scores, "score_grads")
        out = [piece("split_sizes", us.split_sizes)] if us.split_sizes else []
        out.append(piece("entries", entries, "entries"))
        back, again_out, again_back = pieces(values), pieces(grads), [score_piece]
        if peer:
            out, back = out + pieces(grads), [score_piece, *back]
            again_out = [piece("entries", us.entries - entries, "weights"), *again_out]
            again_back = [*again_back, *pieces(values)]
        return out, back, again_out, again_back

    def _exchange_us(self, stage: int, name: str) -> ExchangeUs:
        """Of the slowest of the stage's groups."""
        run, placed = self.layout.run, self.layout.placement.memories[name]
        memory = run.memories[name]

        def group_us(members: Sequence[int]) -> ExchangeUs:
            return even_exchange_us(
                self.topology,
                placed.plan,
                members,
                looked_up(self.layout),
                reads=memory.heads * memory.top_k,
                value_bytes=run.value_bytes_of(memory),
                duplicate_share=duplicate_share(heads=memory.heads, top_k=memory.top_k, num_slots=memory.num_slots),
                hops=self.layout.grid.mp_hops,
                merged=placed.merge,
                products=memory.variant == "peer",
            )

        slowest = self.placements.slowest(
            "mp", memory_group(self.layout, stage), lambda members: group_us(members).total
        )
        return group_us(slowest)

    def _exchange_piece(self, stage: int, block: int, phase: str, us: float, load: str) -> Piece:
        """A collective of an exchange, with the bytes of even reads and largest shards."""
        name, memory = memory_of(self.layout, block)
        plan = self.layout.placement.memories[name].plan
        value_bytes, tokens = self.layout.run.value_bytes_of(memory), looked_up(self.layout)
        part, reads = plan.part_of(0), memory.heads * memory.top_k * tokens
        rows, columns = plan.num_row_shards, plan.num_column_shards
        sums = value_bytes * part.num_columns * tokens
        per_pair = {"entries": INDEX_BYTES + value_bytes, "weights": value_bytes, "score_grads": value_bytes}
        entry_bytes = per_pair.get(load or phase, 0) * reads * part.num_rows / plan.num_slots
        members = memory_group(self.layout, stage)
        group, others, each = "mp", rows * columns - 1, entry_bytes or sums * (phase != "split_sizes")
        if phase.endswith("_inside"):
            group, members, others, each = "inside", members[:rows], rows - 1, sums * columns
        elif phase.endswith("_across"):
            group, members, others = "across", members[::rows], columns - 1
        crossing = self.placements.crossing(group, members)
        sent = others * each
        load = load if rows > 1 else ""
        return Piece(phase, us, group, block, load, sent * (1 - crossing), sent * crossing)


# What tensor-parallel ranks that hold the same tokens gather around a lookup.
_SHARES = ("token_gather", "score_gather")


def _around(compute: Piece, collectives: list[Piece]) -> list[Piece]:
    return _around_all([compute], collectives)


def _around_all(compute: list[Piece], collectives: list[Piece]) -> list[Piece]:
    """Computing with what is gathered before it and what is reduced behind it."""
    gathers = [piece for piece in collectives if piece.phase.startswith("all_gather")]
    return gathers + compute + [piece for piece in collectives if not piece.phase.startswith("all_gather")]
