"""Reads as a run recorded them: entries of every rank for every row shard, counted from the slots that were chosen.

The recorded run may have had any layout; the simulated one deals out the same samples by its own. Samples that nobody
recorded (a longer batch than the recorded one) read what those that were recorded did, over and over.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from mempar.dims import even_cuts
from mempar.errors import ConfigError
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.slot_file import UNKNOWN, TraceKey
from mempar.tools.simulate.loads import memory_of


class TraceLoads:
    """Reads of one recorded step.

    Attributes:
        step: the recorded step that is replayed.
        samples: numbers of its samples, ascending.
    """

    def __init__(self, layout: Layout, slots: Mapping[TraceKey, np.ndarray]) -> None:
        """Take the first step of a trace.

        Args:
            layout: the run that is simulated.
            slots: for each (step, block, sample) `[s, H, K] int32`.

        Raises:
            ConfigError: where the trace is of another model or another sequence length, or lacks a layer.
        """
        self.layout, self._slots = layout, slots
        self._counted: dict[tuple[int, tuple[int, ...], int], np.ndarray] = {}
        self.step = min((step for step, _, _ in slots), default=0)
        by_block: dict[int, set[int]] = defaultdict(set)
        for step, block, sample in slots:
            if step == self.step:
                by_block[block].add(sample)
        for block in layout.run.memory_layers:
            self._check(block, by_block.get(block, set()))
        known = [by_block[block] for block in layout.run.memory_layers]
        self.samples = sorted(set.intersection(*known)) if known else []
        if known and not self.samples:
            raise ConfigError(
                f"the recorded slots of step {self.step} have no sample that all memory layers "
                f"{list(layout.run.memory_layers)} looked up: files of some ranks are missing; give all of a run's."
            )

    def entries(self, block: int, micro_batch: int) -> np.ndarray:
        """See `loads.Loads.entries`."""
        layout, grid = self.layout, self.layout.grid
        found = []
        for dp_rank in range(grid.dp):
            places = layout.batch.samples_of(micro_batch, dp_rank)
            samples = tuple(self.samples[place % len(self.samples)] for place in places)
            for cp_rank in range(grid.cp):
                key = (block, samples, cp_rank)
                # Samples come again where fewer were recorded than a batch has.
                if key not in self._counted:
                    self._counted[key] = self._count(*key)
                found.append(self._counted[key])
        return np.concatenate(found)

    def _count(self, block: int, samples: tuple[int, ...], cp_rank: int) -> np.ndarray:
        """Entries of the tensor-parallel ranks that hold these samples, for each row shard: `[tp, R]`."""
        name, _ = memory_of(self.layout, block)
        placed, tp = self.layout.placement.memories[name], self.layout.grid.tp
        slots, cuts = self._looked_up(block, samples, cp_rank), np.array(placed.plan.row_cuts)
        if placed.merge:
            slots = _distinct(slots)
        owner = np.searchsorted(cuts, slots, side="right") - 1
        ends = even_cuts(len(slots), tp)
        # What was merged away has no owner.
        shares = [owner[start:end][slots[start:end] >= 0] for start, end in itertools.pairwise(ends)]
        return np.stack([np.bincount(share, minlength=placed.plan.num_row_shards) for share in shares])

    def _looked_up(self, block: int, samples: tuple[int, ...], cp_rank: int) -> np.ndarray:
        """Slots `[tokens, M]` of samples on the positions of a context-parallel rank, positions outermost."""
        memory = memory_of(self.layout, block)[1]
        reads = memory.heads * memory.top_k
        if not samples:
            return np.empty((0, reads), dtype=np.int32)
        cp, length = self.layout.grid.cp, self.layout.run.train.seq_length
        # Of 2 cp equal chunks an early and a late one.
        chunks = np.arange(length).reshape(2 * cp, -1) if cp > 1 else np.arange(length)[None]
        positions = chunks[[cp_rank, 2 * cp - 1 - cp_rank] if cp > 1 else [0]].reshape(-1)
        recorded = [self._slots[self.step, block, sample] for sample in samples]
        return np.stack([slots[positions] for slots in recorded], axis=1).reshape(-1, reads)

    def _check(self, block: int, samples: set[int]) -> None:
        memory = memory_of(self.layout, block)[1]
        if not samples:
            raise ConfigError(
                f"the recorded slots have none of block {block} in step {self.step}; the run reads memory in blocks "
                f"{list(self.layout.run.memory_layers)}; record a run of the same model, with all its ranks."
            )
        expected = (self.layout.run.train.seq_length, memory.heads, memory.top_k)
        for sample in samples:
            slots = self._slots[self.step, block, sample]
            if slots.shape != expected:
                raise ConfigError(
                    f"block {block} was recorded as {list(slots.shape)} (positions, heads, top_k) and has "
                    f"{list(expected)} in this run; record a run of the same shape, or use --zipf."
                )
            if slots.max() >= memory.num_slots or (slots == UNKNOWN).any():
                raise ConfigError(
                    f"sample {sample} of block {block} was recorded with slots from {slots.min()} to {slots.max()}, "
                    f"and the table has slots 0 to {memory.num_slots - 1}; record a run of the same table, and give "
                    "the files of all its ranks."
                )


def _distinct(slots: np.ndarray) -> np.ndarray:
    """Slots `[tokens, M]` with all but one of equal slots of a token replaced by -1."""
    ordered = np.sort(slots, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = UNKNOWN
    return ordered
