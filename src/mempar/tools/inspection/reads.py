"""Sums of what a text reads of one memory: by slot for each head of each layer, and all together.

Sums are kept for the slots that were read, in the order of their indices, so nothing has the size of the table.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from mempar.memory.config import MemoryConfig
from mempar.memory.usage import entropy_figures, read_figures, read_skew
from mempar.tools.inspection.findings import LayerFindings, ReadFindings, SlotFindings


class WindowLookups(Protocol):
    """The lookups of one window: see `LookupTally` and `LookupRecord`."""

    tokens: list[int]
    entropy_sum: Tensor
    lookups: dict[int, tuple[np.ndarray, np.ndarray]]


class SlotSums:
    """Reads and weight by slot.

    Attributes:
        slots: `[U] int64`, ascending.
        reads: `[U] int64`, how often each was read.
        weight: `[U] float64`, the sum of its weights.
    """

    def __init__(self, slots: np.ndarray, reads: np.ndarray, weight: np.ndarray) -> None:
        """Sum up slots of which some may come several times.

        Args:
            slots: `[N] int64`.
            reads: `[N] int64`, of each.
            weight: `[N] float64`, of each.
        """
        self.slots, places = np.unique(slots, return_inverse=True)
        self.reads = np.bincount(places, weights=reads, minlength=len(self.slots)).astype(np.int64)
        self.weight = np.bincount(places, weights=weight, minlength=len(self.slots))

    @classmethod
    def of(cls, slots: np.ndarray, weight: np.ndarray) -> "SlotSums":
        """Sum up lookups: slots of any shape, and their weights."""
        return cls(slots.reshape(-1), np.ones(slots.size, dtype=np.int64), weight.reshape(-1))

    @classmethod
    def joined(cls, sums: Sequence["SlotSums"]) -> "SlotSums":
        """The sum of several sums."""
        return cls(*(np.concatenate([getattr(each, part) for each in sums]) for part in ("slots", "reads", "weight")))

    @property
    def share(self) -> np.ndarray:
        """Each slot's share of all the weight, `[U] float64`."""
        return self.weight / max(float(self.weight.sum()), np.finfo(np.float64).tiny)

    def heaviest(self, number: int) -> np.ndarray:
        """Places of the slots of most weight, most first; of equal weight the lowest slot first."""
        return np.argsort(-self.weight, kind="stable")[:number]

    def histogram(self) -> list[tuple[int, int]]:
        """Numbers of reads, ascending, and how many slots were read so often."""
        counts, slots = np.unique(self.reads, return_counts=True)
        return list(zip(counts.tolist(), slots.tolist(), strict=True))


class TextReads:
    """What a text reads of one memory.

    Attributes:
        config: of the memory.
        heads: sums of each head, `[L][H]`.
        first: the lookups of the first window.
    """

    def __init__(self, config: MemoryConfig) -> None:
        """Begin with nothing."""
        self.config = config
        nothing = np.zeros((0,), dtype=np.int64)
        self.heads = [[SlotSums.of(nothing, nothing) for _ in range(config.heads)] for _ in config.layers]
        self.first: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._tokens = np.zeros(len(config.layers), dtype=np.int64)
        self._entropy_sum = np.zeros(len(config.layers) * config.heads)

    def add(self, window: WindowLookups) -> None:
        """Add the lookups of a window."""
        self.first = self.first or window.lookups
        self._tokens += window.tokens
        self._entropy_sum += window.entropy_sum.flatten().cpu().numpy()
        for layer, block in enumerate(self.config.layers):
            slots, weight = window.lookups[block]
            for head, before in enumerate(self.heads[layer]):
                found = SlotSums.of(slots[:, head], weight[:, head])
                self.heads[layer][head] = SlotSums.joined([before, found])

    def total(self) -> SlotSums:
        """Sums over all heads of all layers; two heads of a token that read the same slot count twice."""
        return SlotSums.joined([sums for layer in self.heads for sums in layer])

    def findings(self, num_slots: int, num_top: int) -> ReadFindings:
        """Describe what was read.

        Args:
            num_slots: slots of most weight in the text that are wanted.
            num_top: slots of most weight that are wanted of each token.
        """
        total = self.total()
        histogram = total.histogram()
        figures = {
            "coverage": len(total.slots) / self.config.num_slots,
            **read_figures(read_skew(histogram, self.config.num_slots)),
            **entropy_figures(self._entropy_sum.tolist(), self._tokens.tolist(), self.config),
        }
        share = total.share
        return ReadFindings(
            figures=figures,
            histogram=[[count, slots] for count, slots in histogram],
            slots=[
                SlotFindings(
                    slot=int(total.slots[place]),
                    share=float(share[place]),
                    reads=int(total.reads[place]),
                    peaks=self._peaks_of(int(total.slots[place])),
                )
                for place in total.heaviest(num_slots)
            ],
            layers=[_layer(block, *self.first[block], num_top) for block in self.config.layers],
        )

    def _peaks_of(self, slot: int) -> list[float]:
        """The largest weight that any head in any layer gives a slot, for each token of the first window."""
        found = [np.where(slots == slot, weight, 0.0).max((1, 2)) for slots, weight in self.first.values()]
        return np.max(found, axis=0).tolist()


def _layer(block: int, slots: np.ndarray, weight: np.ndarray, num_top: int) -> LayerFindings:
    tokens = []
    for of_token, weights in zip(slots, weight, strict=True):
        sums = SlotSums.of(of_token, weights)
        tokens.append([[int(sums.slots[place]), float(sums.weight[place])] for place in sums.heaviest(num_top)])
    return LayerFindings(block=block, tokens=tokens, peaks=weight.max(2).tolist())
