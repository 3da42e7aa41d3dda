"""How the reads of a memory layer fall on row shards: evenly, skewed by Zipf's law, or as they were recorded.

`Loads.entries(block, micro_batch)` is all that the simulator asks: how many entries each rank of a pipeline stage sends
to each row shard. Under Zipf's law each head of a layer has its favourites: its slot of popularity r, counted from 1,
is chosen in proportion to `r^-a`, K distinct slots by each token, so that none is chosen more than once. Favourites are
slots of their own that lie anywhere in the table, and stay where they are for the whole step. Product keys would let
them share halves: slots `i n + j` of a favourite half key i lie in one row shard, which is not modelled.
"""

from typing import Protocol

import numpy as np

from mempar.dims import part_sizes
from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import duplicate_share
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.estimate.layout import Layout

# Slots of a head that are placed one by one; the less popular rest lies as evenly as the rows do.
_PLACED = 1 << 16


class Loads(Protocol):
    """Where the reads of a step go."""

    def entries(self, block: int, micro_batch: int) -> np.ndarray:
        """Entries of each rank of a stage `[n]` for each row shard: `[n, R] int64`, merged where the layer merges."""
        ...


def token_counts(layout: Layout, micro_batch: int) -> np.ndarray:
    """Tokens of a micro-batch that each rank of a stage looks up: `[n] int64`; padding is not looked up."""
    grid = layout.grid
    by_dp = [part_sizes(layout.positions * samples, grid.tp) * grid.cp for samples in layout.batch.counts(micro_batch)]
    return np.array(by_dp, dtype=np.int64).reshape(-1)


class ZipfLoads:
    """Reads skewed by Zipf's law, drawn anew for each rank and micro-batch."""

    def __init__(self, layout: Layout, exponent: float, seed: int) -> None:
        """Choose the favourites.

        Args:
            layout: the run.
            exponent: a; 0 chooses evenly.
            seed: of favourites and reads.
        """
        self.layout, self.exponent, self.seed = layout, exponent, seed
        self._shares: dict[int, np.ndarray] = {}

    def shares(self, block: int) -> np.ndarray:
        """Share of a layer's reads that fall on each row shard: `[R]`."""
        if block not in self._shares:
            name, memory = memory_of(self.layout, block)
            plan = self.layout.placement.memories[name].plan
            popularity, rest = inclusion(self.exponent, memory.num_slots, memory.top_k)
            shares = np.zeros(plan.num_row_shards)
            for head in range(memory.heads):
                generator = np.random.default_rng([self.seed, block, head])
                placed = generator.choice(memory.num_slots, len(popularity), replace=False)
                shares += shares_of_rows(plan, placed, popularity, rest)
            self._shares[block] = shares / shares.sum()
        return self._shares[block]

    def entries(self, block: int, micro_batch: int) -> np.ndarray:
        """See `Loads.entries`."""
        name, memory = memory_of(self.layout, block)
        reads = token_counts(self.layout, micro_batch) * memory.heads * memory.top_k
        if self.layout.placement.memories[name].merge:
            saved = duplicate_share(heads=memory.heads, top_k=memory.top_k, num_slots=memory.num_slots)
            reads = np.rint(reads * (1.0 - saved)).astype(np.int64)
        generator = np.random.default_rng([self.seed, block, micro_batch, memory.heads])
        return generator.multinomial(reads, self.shares(block))


def inclusion(exponent: float, num_slots: int, top_k: int) -> tuple[np.ndarray, float]:
    """How often each slot is among the K distinct ones that a head chooses for a token.

    Args:
        exponent: a.
        num_slots: S.
        top_k: K.

    Returns:
        `[min(S, 65536)]`, probabilities by popularity, and the sum of those of all other slots; together K.
    """
    placed = min(num_slots, _PLACED)
    weight = np.arange(1, placed + 1, dtype=np.float64) ** -exponent
    beyond = _integral(exponent, placed + 0.5, num_slots + 0.5)
    left = np.cumsum(weight[::-1])[::-1] + beyond
    # The most popular ones are always chosen; the others share what is left of K in proportion.
    always = int(np.argmax((top_k - np.arange(placed)) * weight <= left)) if top_k < num_slots else placed
    scale = (top_k - always) / left[always] if always < placed else 0.0
    probability = np.minimum(scale * weight, 1.0)
    probability[:always] = 1.0
    return probability, scale * beyond


def shares_of_rows(plan: ShardPlan, placed: np.ndarray, weight: np.ndarray, rest: float) -> np.ndarray:
    """Weights of row shards `[R]`: of the slots that were placed, and of a rest that lies evenly."""
    cuts = np.array(plan.row_cuts)
    owner = np.searchsorted(cuts, placed, side="right") - 1
    return np.bincount(owner, weight, plan.num_row_shards) + rest * np.diff(cuts) / plan.num_slots


def _integral(exponent: float, start: float, end: float) -> float:
    """Of x^-a, which the sum over whole numbers in between comes close to far out."""
    if end <= start:
        return 0.0
    if abs(exponent - 1.0) < 1e-9:
        return float(np.log(end / start))
    return (end ** (1.0 - exponent) - start ** (1.0 - exponent)) / (1.0 - exponent)


def memory_of(layout: Layout, block: int) -> tuple[str, MemoryConfig]:
    """Name and settings of the memory whose layer a block has."""
    return next((name, memory) for name, memory in layout.run.memories.items() if block in memory.layers)
