"""Adding up, over all ranks, how often each slot was read, without a count per slot anywhere but at its owner.

Three rounds of one operation, `add_by_key`: (slot, reads) pairs go to the rank that owns the row, from
there to the first copy of the shard, and pairs of (count, slots read so often), of which there are few,
to the first member of the memory-parallel group. Columns and copies hold the same rows: each row is
counted at the first of them alone.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.parallel.collectives import MemberGroup
from mempar.parallel.shard_plan import ShardPlan

PHASE = "read_counts"


@dataclass(frozen=True, kw_only=True)
class ReadCounts:
    """What this rank learnt; empty on ranks that are not the first holder of anything.

    Attributes:
        shard_reads: reads of this rank's rows, where it is their first holder; else 0.
        histogram: on the first member of the first group, pairs of a count and the number of slots of the whole
            table that were read so often, for counts from 1; empty on all other ranks.
    """

    shard_reads: int
    histogram: list[tuple[int, int]]


def count_reads(slots: Tensor, counts: Tensor, plan: ShardPlan, memory: MemberGroup, copies: MemberGroup) -> ReadCounts:
    """Add up reads over all ranks that hold the table. All of them must call it, with no reads too.

    Args:
        slots: `[U] int64`, distinct slots that tokens of this rank read, ascending.
        counts: `[U] int64`, how often.
        plan: cuts of the table.
        memory: this rank's memory-parallel group.
        copies: the holders of this rank's shard.

    Returns:
        This rank's part of the result. The host waits.
    """
    cuts = torch.tensor(plan.row_cuts, device=slots.device)
    bounds = torch.searchsorted(slots, cuts).tolist()
    # Members with the first columns stand first, in the order of their rows.
    to_owner = [end - start for start, end in itertools.pairwise(bounds)]
    to_owner += [0] * (memory.size - len(to_owner))
    slots, counts = add_by_key(slots, counts, to_owner, memory)
    _, counts = add_by_key(slots, counts, _all_to_first(slots, copies), copies)
    values, num_slots = torch.unique(counts, return_counts=True)
    values, num_slots = add_by_key(values, num_slots, _all_to_first(values, memory), memory)
    histogram = list(zip(values.tolist(), num_slots.tolist(), strict=True))
    return ReadCounts(shard_reads=int(counts.sum()), histogram=histogram)


def add_by_key(keys: Tensor, numbers: Tensor, send_sizes: list[int], group: MemberGroup) -> tuple[Tensor, Tensor]:
    """Send (key, number) pairs to members and add the numbers of equal keys. Every member must call it.

    Args:
        keys: `[E] int64`, those for member 0 first.
        numbers: `[E] int64`.
        send_sizes: pairs for each member.
        group: who takes part.

    Returns:
        Distinct keys, ascending, and the sums of the numbers received under them. A rank sends
        8 (G - 1) bytes and 16 for each pair that is not its own; the host waits for the sizes.
    """
    received = group.exchange_counts([[size] for size in send_sizes], keys.device, PHASE)
    sizes = [size for (size,) in received]
    pairs = group.all_to_all(torch.stack([keys, numbers], 1), send_sizes, sizes, PHASE)
    distinct, place = torch.unique(pairs[:, 0], return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, place, pairs[:, 1])


def _all_to_first(keys: Tensor, group: MemberGroup) -> list[int]:
    return [len(keys)] + [0] * (group.size - 1)
