"""Groups whose members are threads of this process, for tests of what is sent without processes.

An all-to-all puts a member's parts on a wire that the threads of a group share, and checks what torch
would check: sizes, dtypes, contiguity. Tests get it as the fixture `in_threads` (conftest.py).
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.parallel.collectives import MemberGroup
from mempar.parallel.groups import MemoryGroups
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan

GLOO_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


def plan_of(num_rows: int, num_columns: int, num_slots: int = 25, value_dim: int = 7, tile: int = 2) -> ShardPlan:
    return ShardPlan(
        num_slots=num_slots,
        value_dim=value_dim,
        column_tile=tile,
        num_row_shards=num_rows,
        num_column_shards=num_columns,
    )


def sent(ledger: ByteLedger) -> dict[str, int]:
    return dict(ledger.sent_bytes)


def owned_entries(plan: ShardPlan, slots: list[Tensor], *, merged: bool = False) -> list[list[int]]:
    """n[r][i]: entries of member r that row shard i owns; a token's entries are distinct when merged."""
    spans = list(itertools.pairwise(plan.row_cuts))
    entries = [[set(token) if merged else token for token in slot.tolist()] for slot in slots]
    return [
        [sum(start <= slot < end for token in tokens for slot in token) for start, end in spans] for tokens in entries
    ]


@dataclass
class Wire:
    """What joins the threads of one group: a slot for each member's parts, and a barrier."""

    size: int
    parts: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass(frozen=True)
class ThreadGroup:
    """Stands in for a torch process group."""

    wire: Wire
    rank: int


def all_to_all_between_threads(
    received: Tensor, send: Tensor, receive_sizes: list[int], send_sizes: list[int], group: ThreadGroup
) -> None:
    wire = group.wire
    assert send.is_contiguous() and received.is_contiguous()
    assert send.dtype in GLOO_DTYPES, f"gloo carries no {send.dtype}"
    assert len(send_sizes) == len(receive_sizes) == wire.size
    assert sum(send_sizes) == len(send) and sum(receive_sizes) == len(received)
    wire.parts[group.rank] = send.detach().clone().split(send_sizes)
    wire.barrier.wait()
    arrived = [wire.parts[member][group.rank] for member in range(wire.size)]
    assert [len(part) for part in arrived] == receive_sizes
    assert all(part.dtype == received.dtype for part in arrived)
    received.copy_(torch.cat(arrived))
    wire.barrier.wait()


# What collectives.py needs of torch.distributed.
THREAD_DIST = SimpleNamespace(
    get_rank=lambda group: group.rank,
    get_world_size=lambda group: group.wire.size,
    all_to_all_single=all_to_all_between_threads,
)


def launch_one_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """Interpret kernels in one thread at a time: Triton's interpreter changes the language while it runs one."""
    from triton.runtime.interpreter import GridExecutor

    lock, launch = threading.Lock(), GridExecutor.__call__

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock:
            launch(self, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", alone)


class Threads:
    """Runs functions as every member of a group, each in a thread."""

    def __call__(self, size: int, work: Callable[[MemberGroup], Any]) -> list[Any]:
        """Run work(group) as every member of one group; returns what the members return."""
        wire = Wire(size)
        return self._run(size, [wire], lambda rank: work(MemberGroup(ThreadGroup(wire, rank), ByteLedger())))

    def grid(self, grid: RankGrid, work: Callable[[MemoryGroups], Any]) -> list[Any]:
        """Run work(groups) as every member of the one memory-parallel group of a grid."""
        (members,) = grid.memory_groups((0,))
        wired = [
            [(ranks, Wire(len(ranks))) for ranks in lists]
            for lists in ([members], grid.inside_groups((0,)), grid.across_groups((0,)))
        ]

        def member(rank: int) -> Any:
            ledger = ByteLedger()
            memory, inside, across = (self._join(rank, groups, ledger) for groups in wired)
            alone = MemberGroup(None, ledger)
            return work(
                MemoryGroups(memory=memory, inside=inside, across=across, copies=(alone,), tensor=alone, ledger=ledger)
            )

        return self._run(len(members), [wire for groups in wired for _, wire in groups], member)

    @staticmethod
    def _join(rank: int, groups: list[tuple[list[int], Wire]], ledger: ByteLedger) -> MemberGroup:
        mine = next(((ranks, wire) for ranks, wire in groups if rank in ranks), None)
        if mine is None or mine[1].size == 1:
            return MemberGroup(None, ledger)
        return MemberGroup(ThreadGroup(mine[1], mine[0].index(rank)), ledger)

    @staticmethod
    def _run(size: int, wires: Sequence[Wire], work: Callable[[int], Any]) -> list[Any]:
        def member(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                for wire in wires:
                    wire.barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(member, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
