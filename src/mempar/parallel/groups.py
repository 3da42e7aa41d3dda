"""The one place where mempar makes process groups.

Megatron's own groups are made by its parallel_state; these stand beside them. torch requires that
every rank of the world takes part in making every group, in the same order.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from mempar.marks import Marks
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.ranks import RankGrid


@dataclass(frozen=True, kw_only=True)
class MemoryGroups:
    """This rank's groups of the memory dimension.

    Attributes:
        memory: the P ranks over which tables are cut.
        inside: of a two-hop grid the R ranks that hold this rank's column shard; else this rank alone.
        across: of a two-hop grid the W ranks that hold this rank's row shard; else this rank alone.
        copies: for each memory of the model, the ranks that hold the same shards of it (replicas and
            stage copies).
        tensor: the tensor-parallel ranks, for the token split.
        ledger: bytes sent in all of them.
    """

    memory: MemberGroup
    inside: MemberGroup
    across: MemberGroup
    copies: tuple[MemberGroup, ...]
    tensor: MemberGroup
    ledger: ByteLedger


def make_memory_groups(
    grid: RankGrid,
    rank: int,
    stages_of_memories: Sequence[tuple[int, ...]],
    tensor_group: dist.ProcessGroup | None,
    timeout: datetime.timedelta | None = None,
    marks: Marks | None = None,
) -> tuple[MemoryGroups, list[dist.ProcessGroup]]:
    """Make the memory-parallel groups of the world; every rank must call it.

    Args:
        grid: sizes of all dimensions.
        rank: this world rank.
        stages_of_memories: for each memory of the model, the pipeline stages that hold its tables.
        tensor_group: megatron's tensor-parallel group; None where there is one rank in it.
        timeout: of their collectives; torch's own by default.
        marks: take the time of them.

    Returns:
        This rank's groups, and the torch groups that were made here (to be destroyed at the end).
    """
    ledger = ByteLedger()
    marks = marks or Marks()
    made: list[dist.ProcessGroup] = []

    def join(rank_lists: list[list[int]], name: str) -> MemberGroup:
        joined: dist.ProcessGroup | None = None
        for ranks in rank_lists:
            if len(ranks) == 1:
                continue
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                joined = group
                made.append(group)
        return MemberGroup(joined, ledger, name=name, marks=marks)

    every_stage = tuple(sorted(set().union(*stages_of_memories)))
    memory = join(grid.memory_groups(every_stage), "mp")
    inside = join(grid.inside_groups(every_stage), "mp_inside")
    across = join(grid.across_groups(every_stage), "mp_across")
    # Memories on the same stages have the same copies.
    by_stages = {stages: join(grid.copy_groups(stages), "copies") for stages in dict.fromkeys(stages_of_memories)}
    groups = MemoryGroups(
        memory=memory,
        inside=inside,
        across=across,
        copies=tuple(by_stages[stages] for stages in stages_of_memories),
        tensor=MemberGroup(tensor_group, ledger, name="tp", marks=marks),
        ledger=ledger,
    )
    return groups, made
