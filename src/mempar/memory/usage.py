"""How a table is used, as one rank counts it: which rows were read, how often, and how sharply.

`RowHistory` lives as long as the run and costs one small write a step; a `LookupTally` lives for one
step in many. Neither knows of other ranks: `runtime/usage.py` joins what they count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.memory.config import MemoryConfig


class RowHistory:
    """When each row of a shard was read last.

    Attributes:
        last_read: `[S_i] int32`, number of the step (from 1) that read the row last; 0 is never.
        step: steps done so far.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        """Begin with rows that were never read.

        Args:
            num_rows: S_i.
            device: where the shard lies.
        """
        self.last_read = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.step = 0

    def mark(self, rows: Tensor) -> None:
        """Note the rows that one more step read.

        Args:
            rows: `[U] int32 or int64`, read by any token of the global batch.
        """
        self.step += 1
        self.last_read.index_fill_(0, rows.long(), self.step)

    def rows_read_in(self, num_steps: int) -> int:
        """Rows read in the last `num_steps` steps; the host waits."""
        return int((self.last_read > self.step - num_steps).sum())

    def rows_never_read(self) -> int:
        """Rows not read since the history began; the host waits."""
        return int((self.last_read == 0).sum())


class LookupTally:
    """What the lookups of one step chose, for the tokens of this rank.

    Attributes:
        tokens: `[L]`, tokens looked up by each layer of the table.
        entropy_sum: `[L, H] float64`, entropy of the K weights in nats, summed over these tokens.
        without_gradients: whether lookups without gradients count, as those of a model that is not in training. In
            training they are evaluation, or the first of two passes.
    """

    without_gradients = False

    def __init__(self, blocks: Sequence[int], heads: int, device: torch.device) -> None:
        """Begin with nothing.

        Args:
            blocks: the L blocks that read the table.
            heads: H.
            device: where they compute.
        """
        self._layer = {block: layer for layer, block in enumerate(blocks)}
        self._slots = [torch.zeros(0, dtype=torch.int64, device=device)]
        self.tokens = [0] * len(blocks)
        self.entropy_sum = torch.zeros(len(blocks), heads, dtype=torch.float64, device=device)

    def add(self, block: int, slot_index: Tensor, weight: Tensor) -> None:
        """Count one lookup.

        Args:
            block: the block that looks up.
            slot_index: `[T, H, K] int64`.
            weight: `[T, H, K]`, softmax weights.
        """
        layer = self._layer[block]
        self._slots.append(slot_index.reshape(-1))
        self.tokens[layer] += len(slot_index)
        self.entropy_sum[layer] += torch.special.entr(weight.detach().double()).sum((0, 2))

    def reads(self) -> tuple[Tensor, Tensor]:
        """Slots that were read and how often; two heads of a token that read the same slot count twice.

        Returns:
            `slots [U] int64`, ascending, and `counts [U] int64`.
        """
        return torch.unique(torch.cat(self._slots), return_counts=True)


@dataclass(frozen=True, kw_only=True)
class ReadSkew:
    """How unevenly reads fall on slots.

    Attributes:
        reads: all reads.
        busiest_slot_reads: of the slot that was read most often.
        busiest_share: share of the reads that fall on the busiest hundredth of all slots.
        effective_share: exp(entropy of the reads over slots) / S; 1 when all slots are read equally often.
    """

    reads: int
    busiest_slot_reads: int
    busiest_share: float
    effective_share: float


def read_skew(histogram: Sequence[tuple[int, int]], num_slots: int) -> ReadSkew:
    """Describe how reads fall on slots.

    Args:
        histogram: pairs of a count from 1 and the number of slots read so often.
        num_slots: S.

    Returns:
        Figures that depend on the histogram alone, exact but for one rounding; zeros when nothing was read.
    """
    reads = sum(count * slots for count, slots in histogram)
    if not reads:
        return ReadSkew(reads=0, busiest_slot_reads=0, busiest_share=0.0, effective_share=0.0)
    busiest_first = sorted(histogram, reverse=True)
    left, busiest_reads = -(-num_slots // 100), 0
    for count, slots in busiest_first:
        busiest_reads += count * min(slots, left)
        left -= min(slots, left)
    weighed_logs = math.fsum(slots * count * math.log(count) for count, slots in busiest_first)
    return ReadSkew(
        reads=reads,
        busiest_slot_reads=busiest_first[0][0],
        busiest_share=busiest_reads / reads,
        effective_share=reads * math.exp(-weighed_logs / reads) / num_slots,
    )


def row_figures(read_rows: float, dead_rows: float, num_slots: int, *, window: int, since: int) -> dict[str, float]:
    """Figures of a memory's rows, by their names in metrics.

    Args:
        read_rows: rows read in the last `window` steps.
        dead_rows: rows never read.
        num_slots: S.
        window: steps.
        since: the step after which the history begins.
    """
    return {
        "coverage": read_rows / num_slots,
        "coverage_steps": window,
        "dead_slots": int(dead_rows),
        "dead_since_step": since,
    }


def read_figures(skew: ReadSkew) -> dict[str, float]:
    """Figures of how unevenly reads fall on slots, by their names in metrics."""
    return {
        "reads": skew.reads,
        "busiest_slot_reads": skew.busiest_slot_reads,
        "busiest_percent_share": skew.busiest_share,
        "effective_slots_share": skew.effective_share,
    }


def entropy_figures(entropy_sum: Sequence[float], tokens: Sequence[float], config: MemoryConfig) -> dict[str, float]:
    """Mean entropy of each head's weights in nats, by its name in metrics.

    Args:
        entropy_sum: `[L * H]`, summed over tokens.
        tokens: `[L]`, how many.
        config: of the memory.
    """
    return {
        f"entropy/block_{block}/head_{head}": entropy_sum[layer * config.heads + head] / tokens[layer]
        for layer, block in enumerate(config.layers)
        for head in range(config.heads)
    }
