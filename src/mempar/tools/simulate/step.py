"""One training step on a timeline: the pipeline's passes, gradients summed over ranks, and the optimizers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mempar.parallel.cost import INDEX_BYTES, duplicate_share
from mempar.parallel.exchange_time import even_exchange_us
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import DTYPE_BYTES, Layout
from mempar.runtime.estimate.tables import deposits_of_lookup, looked_up
from mempar.runtime.hardware import Hardware
from mempar.tools.plan.communication import (
    Collective,
    gradient_collectives,
    memory_group,
    stage_send,
    weight_collectives,
)
from mempar.tools.plan.roofline import Roofline
from mempar.tools.plan.update import update_compute_us
from mempar.tools.simulate.exchange_load import ExchangeLoad
from mempar.tools.simulate.groups import stage_groups
from mempar.tools.simulate.loads import Loads, memory_of
from mempar.tools.simulate.pieces import PassPieces, Piece, PieceMaker
from mempar.tools.simulate.pipeline import walk
from mempar.tools.simulate.schedule import Pass
from mempar.tools.simulate.timeline import Picoseconds, Timeline

_PS_PER_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What makes ranks differ.

    Attributes:
        loads: where reads go; None for even reads.
        jitter: standard deviation of the factor that a rank's computing in one pass is multiplied by, whose mean is 1.
        seed: of the jitter.
    """

    loads: Loads | None = None
    jitter: float = 0.0
    seed: int = 1


@dataclass
class _LayerLoad:
    """Times of one lookup that depend on who owns the rows: `[n]`, for the ranks of a stage."""

    times: dict[str, np.ndarray] = field(default_factory=dict)
    gather_us: np.ndarray | float = 0.0


class Step:
    """A simulated step.

    Attributes:
        timeline: all that happened.
        sent_bytes: of a rank of each stage, to ranks of its node and to others.
        entries: entries that each rank of a stage was asked for in the step `[n]`; of stages with uneven reads.
    """

    def __init__(
        self, layout: Layout, hardware: Hardware, disturbance: Disturbance, watched: Sequence[int] = ()
    ) -> None:
        """Simulate.

        Args:
            layout: a run on some ranks.
            hardware: what each rank is.
            disturbance: what makes ranks differ.
            watched: world ranks whose every task is kept.
        """
        self.layout, self.hardware, self.topology = layout, hardware, hardware.topology
        self.disturbance = disturbance
        grid = layout.grid
        self.timeline = Timeline(grid.pp, grid.stage_size, watched)
        self.sent_bytes = np.zeros((grid.pp, 2))
        self.entries: dict[int, np.ndarray] = {}
        self._members = stage_groups(layout)
        self._loads: dict[tuple[int, int, int], _LayerLoad] = {}
        maker = PieceMaker(layout, hardware, self.topology)
        self._maker = maker
        self._pieces: list[list[PassPieces]] = [
            [maker.chunk(stage, chunk) for chunk in layout.chunks_of(stage)] for stage in range(grid.pp)
        ]
        self._sends = {stage: stage_send(layout, stage) for stage in range(grid.pp)} if grid.pp > 1 else {}
        walk(
            self.timeline,
            vpp=layout.run.parallel.vpp,
            num_micro_batches=layout.batch.num_micro_batches,
            compute=self._pass,
            message_ps=self._message_ps,
        )
        self.timeline.place = (-1, -1)
        self._after_passes()

    def _pass(self, stage: int, step: Pass) -> None:
        """Add the pieces of a pass."""
        pieces = self._pieces[stage][step.chunk]
        factor = self._factor(stage, step)
        for piece in pieces.forward if step.is_forward else pieces.backward:
            self._add(stage, piece, step.micro_batch, factor)
        if not step.is_forward:
            for block in self.layout.chunks_of(stage)[step.chunk].blocks:
                self._loads.pop((stage, block, step.micro_batch), None)

    def _add(self, stage: int, piece: Piece, micro_batch: int, factor: np.ndarray | None) -> None:
        self.sent_bytes[stage] += piece.inside_bytes, piece.across_bytes
        self.timeline.place = (piece.block, micro_batch)
        us: np.ndarray | float = piece.us
        if piece.load and self.disturbance.loads is not None:
            load = self._load(stage, piece.block, micro_batch)
            us = us + load.gather_us if piece.load == "gather" else load.times[piece.load]
        if piece.group:
            self.timeline.collective((stage,), piece.phase, self._members[piece.group], picoseconds(us))
        else:
            self.timeline.compute(stage, piece.phase, picoseconds(us if factor is None else us * factor))

    def _factor(self, stage: int, step: Pass) -> np.ndarray | None:
        sigma = self.disturbance.jitter
        if not sigma:
            return None
        key = [self.disturbance.seed, stage, step.chunk, step.micro_batch, int(step.is_forward)]
        # Never negative, as a normal distribution would be.
        spread = np.log1p(sigma**2)
        normal = np.random.default_rng(key).standard_normal(self.layout.grid.stage_size)
        return np.exp(np.sqrt(spread) * normal - spread / 2)

    def _message_ps(self, source: int, target: int) -> int:
        forward = (source + 1) % self.layout.grid.pp == target
        collective = self._sends[source if forward else target]
        crossing = self._maker.placements.crossing(collective.group, collective.members)
        self.sent_bytes[source] += np.array([1 - crossing, crossing]) * collective.sent_bytes / 2
        return _whole_picoseconds(self._maker.collective_us(collective))

    def _load(self, stage: int, block: int, micro_batch: int) -> _LayerLoad:
        """Times of a lookup; the same in its backward pass, and when it is computed again."""
        key = (stage, block, micro_batch)
        if key not in self._loads:
            self._loads[key] = self._priced(stage, block, micro_batch)
        return self._loads[key]

    def _priced(self, stage: int, block: int, micro_batch: int) -> _LayerLoad:
        assert self.disturbance.loads is not None
        layout, (name, memory) = self.layout, memory_of(self.layout, block)
        plan, value_bytes = layout.placement.memories[name].plan, layout.run.value_bytes_of(memory)
        grid = layout.grid
        entries = self.disturbance.loads.entries(block, micro_batch)
        load = ExchangeLoad(entries, plan, self.topology, stage * grid.stage_size)
        self.entries[stage] = self.entries.get(stage, 0) + load.received
        rows, values = (np.repeat(load.busiest.us(self.topology, size), grid.mp) for size in (INDEX_BYTES, value_bytes))
        # The planner's owners read entries that are not merged; what uneven reads add to that is what is priced here.
        expected = deposits_of_lookup(layout, memory, plan, plan.part_of(0)).entries * (1.0 - self._merged(name))
        roof = Roofline(self.hardware, DTYPE_BYTES[layout.run.train.dtype])
        row_us = roof.rows(1, plan.part_of(0).num_columns * value_bytes) - roof.rows(0, 0)
        return _LayerLoad(
            times={"entries": self._counts_us(stage, name) + rows + values, "weights": values, "score_grads": values},
            gather_us=len(memory.table_names) * row_us * (load.received - expected),
        )

    def _merged(self, name: str) -> float:
        """Share of a memory's reads that merging saves, when they fall evenly."""
        memory = self.layout.run.memories[name]
        if not self.layout.placement.memories[name].merge:
            return 0.0
        return duplicate_share(heads=memory.heads, top_k=memory.top_k, num_slots=memory.num_slots)

    def _counts_us(self, stage: int, name: str) -> float:
        """What phase `entries` takes beside the entries themselves: how many a token has."""
        placed, memory = self.layout.placement.memories[name], self.layout.run.memories[name]

        def group_us(members: Sequence[int]) -> float:
            none = even_exchange_us(
                self.topology,
                placed.plan,
                members,
                looked_up(self.layout),
                reads=memory.heads * memory.top_k,
                value_bytes=self.layout.run.value_bytes_of(memory),
                merged=True,
                duplicate_share=1.0,
            )
            return none.entries

        return group_us(self._maker.placements.slowest("mp", memory_group(self.layout, stage), group_us))

    def _after_passes(self) -> None:
        """Sum gradients, agree, update: in the order of runtime/step.py and runtime/optim.py."""
        layout, grid = self.layout, self.layout.grid
        dense = [dense_bytes(layout, stage) for stage in range(grid.pp)]
        gradients = [gradient_collectives(layout, stage, dense[stage]) for stage in range(grid.pp)]
        updates = [
            update_compute_us(layout.run, layout, stage, dense[stage], self.hardware) for stage in range(grid.pp)
        ]
        own = [[each for each in found if each.group not in ("embedding", "copies")] for found in gradients]
        for stage in range(grid.pp):
            self._collectives(stage, own[stage])
        self._across_stages("embedding", gradients)
        for stage in range(grid.pp):
            self._compute(stage, "reduce_rows", updates[stage].get("reduce_rows", 0.0) * self._share_of_rows(stage))
        self._across_stages("copies", gradients)
        last = [weight_collectives(layout, stage, dense[stage]) for stage in range(grid.pp)]
        self._across_stages("world", last)
        for stage in range(grid.pp):
            self._compute(stage, "dense_update", updates[stage]["dense_update"])
            self._collectives(stage, [each for each in last[stage] if each.group != "world"])
            self._compute(stage, "row_update", updates[stage].get("row_update", 0.0))

    def _share_of_rows(self, stage: int) -> np.ndarray | float:
        """Entries that each rank has to sum, as a share of what they would be if reads fell evenly."""
        if stage not in self.entries:
            return 1.0
        return self.entries[stage] / max(1.0, float(self.entries[stage].mean()))

    def _compute(self, stage: int, phase: str, us: np.ndarray | float) -> None:
        if np.any(us):
            self.timeline.compute(stage, phase, picoseconds(us))

    def _collectives(self, stage: int, found: list[Collective]) -> None:
        for piece in self._maker.collectives(found):
            self._add(stage, piece, -1, None)

    def _across_stages(self, group: str, found: list[list[Collective]]) -> None:
        """Add the collectives of groups that have members on several stages, each of which lists them."""
        done: set[tuple[object, ...]] = set()
        for collectives in found:
            # Several memories may have copies on the same ranks, and others on one of the stages alone.
            listed: Counter[tuple[object, ...]] = Counter()
            for each in (each for each in collectives if each.group == group):
                same = (each.phase, tuple(each.members))
                listed[same] += 1
                key = (*same, listed[same])
                if key in done:
                    continue
                done.add(key)
                stages = tuple(sorted({rank // self.layout.grid.stage_size for rank in each.members}))
                for piece in self._maker.collectives([each]):
                    for stage in stages:
                        self.sent_bytes[stage] += piece.inside_bytes, piece.across_bytes
                    self.timeline.collective(stages, piece.phase, self._members[group], picoseconds(piece.us))


def picoseconds(us: np.ndarray | float) -> Picoseconds:
    """Microseconds as whole picoseconds."""
    if isinstance(us, np.ndarray):
        return np.rint(us * _PS_PER_US).astype(np.int64)
    return _whole_picoseconds(us)


def _whole_picoseconds(us: float) -> int:
    return round(us * _PS_PER_US)
