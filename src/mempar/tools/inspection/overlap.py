"""What two texts read in common of one memory, and which slots of theirs lie near each other."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.tools.inspection.findings import HeadOverlap, NearSlot, OverlapFindings
from mempar.tools.inspection.reads import SlotSums, TextReads

# Slots of most weight among which nearest ones are looked for.
MOST_CANDIDATES = 1024


def overlap(
    one: TextReads, other: TextReads, gather: Callable[[Tensor], Tensor], value_dim: int, number: int
) -> OverlapFindings:
    """Compare what two texts read.

    Args:
        one: reads of a text.
        other: reads of another text, of the same memory.
        gather: value rows `[U, D]` of slots `[U] int64`, ascending.
        value_dim: D.
        number: slots that are wanted in each list.
    """
    config, totals = one.config, (one.total(), other.total())
    shared, mine, theirs = np.intersect1d(totals[0].slots, totals[1].slots, return_indices=True)
    shares = totals[0].share[mine], totals[1].share[theirs]
    candidates = [min(MOST_CANDIDATES, len(total.slots)) for total in totals]
    # What both read much of comes first.
    order = np.argsort(-np.minimum(*shares), kind="stable")[:number]
    return OverlapFindings(
        jaccard=jaccard(*totals),
        cosine=cosine(*totals),
        shared_slots=len(shared),
        shared_weight=[float(share.sum()) for share in shares],
        heads=[
            HeadOverlap(
                block=block,
                head=head,
                jaccard=jaccard(one.heads[layer][head], other.heads[layer][head]),
                cosine=cosine(one.heads[layer][head], other.heads[layer][head]),
            )
            for layer, block in enumerate(config.layers)
            for head in range(config.heads)
        ],
        shared=[[int(shared[place]), float(shares[0][place]), float(shares[1][place])] for place in order],
        nearest=[
            nearest(totals[0], totals[1], gather, number),
            nearest(totals[1], totals[0], gather, number),
        ],
        candidates=candidates,
        chance=[chance_cosine(count, value_dim) for count in candidates],
    )


def chance_cosine(number: int, value_dim: int) -> float:
    """About the largest cosine of a row with so many others, if all had random directions in D dimensions."""
    # Such cosines are nearly normal; this is Blom's approximation of the largest of so many normal numbers.
    return min(1.0, NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) / math.sqrt(value_dim))


def jaccard(one: SlotSums, other: SlotSums) -> float:
    """Slots that both read over slots that either reads."""
    shared = len(np.intersect1d(one.slots, other.slots))
    return shared / (len(one.slots) + len(other.slots) - shared)


def cosine(one: SlotSums, other: SlotSums) -> float:
    """Of the weights that both give to slots; 1 where they are in proportion."""
    _, mine, theirs = np.intersect1d(one.slots, other.slots, return_indices=True)
    product = float(one.weight[mine] @ other.weight[theirs])
    return product / float(np.linalg.norm(one.weight) * np.linalg.norm(other.weight))


def nearest(one: SlotSums, other: SlotSums, gather: Callable[[Tensor], Tensor], number: int) -> list[NearSlot]:
    """Find slots near those that one text reads and the other does not.

    Args:
        one: reads of the text whose slots are asked about.
        other: reads of the text in which near ones are looked for, among its `MOST_CANDIDATES` slots of most weight.
        gather: value rows of slots.
        number: slots that are asked about at the most, those of most weight.
    """
    own = ~np.isin(one.slots, other.slots)
    asked = [place for place in one.heaviest(len(one.slots)) if own[place]][:number]
    candidates = np.sort(other.heaviest(MOST_CANDIDATES))
    if not asked:
        return []
    similar = _directions(one.slots[np.sort(asked)], gather) @ _directions(other.slots[candidates], gather).T
    cosines, places = similar.max(1)
    found = {
        place: (int(candidates[near]), near_cosine)
        for place, near, near_cosine in zip(np.sort(asked).tolist(), places.tolist(), cosines.tolist(), strict=True)
    }
    return [
        NearSlot(
            slot=int(one.slots[place]),
            share=float(one.share[place]),
            nearest=int(other.slots[found[place][0]]),
            nearest_share=float(other.share[found[place][0]]),
            cosine=found[place][1],
        )
        for place in asked
    ]


def _directions(slots: np.ndarray, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Value rows of ascending slots at length 1, `[U, D] float64`; zeros, and what is not finite, are zeros."""
    rows = gather(torch.from_numpy(slots)).double()
    return F.normalize(rows.nan_to_num(0.0, 0.0, 0.0), dim=1)
