"""The tables of a model on one rank: shards, how its memory layers reach them, who holds copies.

Here the two blind rooms meet: `memory` says what a layer computes and asks readers for rows,
`parallel` reads rows wherever they lie. A table stands beside the model, not in it: megatron would
cast it, broadcast it and give it a dense gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mempar.kernels.dispatch import TORCH, Backend
from mempar.marks import Marks
from mempar.memory.balance import BalanceMeter
from mempar.memory.config import MemoryConfig
from mempar.memory.layer import SlotHook
from mempar.memory.lookup import LocalReader, Readers, RowReader, SilentReader
from mempar.memory.usage import LookupTally
from mempar.memory.values import ValueShard
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.one_hop import OneHop
from mempar.parallel.token_split import TokenSplitReader
from mempar.parallel.two_hops import TwoHops
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.in_flight import InFlight, Pass

TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}

# Given a 0-based block number, the positions at hand and the pass, the hook that sees its choices, or None.
HookFactory = Callable[[int, int, Pass], SlotHook | None]


@dataclass(frozen=True, kw_only=True)
class Table:
    """This rank's shard of one table.

    Attributes:
        name: of the whole table, e.g. `memory.values`.
        memory: name of the memory that it belongs to.
        config: that memory's settings.
        number: place among all tables of the model.
        shard: the rows and columns on this rank.
        copies: the ranks that hold the same rows and columns.
    """

    name: str
    memory: str
    config: MemoryConfig
    number: int
    shard: ValueShard
    copies: MemberGroup


class TableAccess:
    """How the layers of one memory reach its tables on this rank.

    Attributes:
        readers: where rows come from.
        backend: what computes lookups.
        in_flight: which micro-batch is looked up.
        member_dp_ranks: data-parallel rank of every member of the memory-parallel group.
        balance: the balance losses of its layers' lookups.
        hook_factory: called with (block, positions, pass) before every lookup; recording or replaying slot
            choices in tests and studies. A layer that is computed again in backward calls it again.
        marks: take the time of lookups.
        tally: counts the lookups of a training step that is watched; None in all others.
    """

    def __init__(
        self,
        readers: Readers,
        in_flight: InFlight,
        member_dp_ranks: list[int],
        value_dim: int,
        backend: Backend = TORCH,
        marks: Marks | None = None,
    ) -> None:
        self.readers = readers
        self.marks = marks or Marks()
        self.backend = backend
        self.in_flight = in_flight
        self.member_dp_ranks = member_dp_ranks
        self.balance = BalanceMeter()
        self.hook_factory: HookFactory | None = None
        self.tally: LookupTally | None = None
        self._value_dim = value_dim

    def silence(self) -> Readers:
        """Let every lookup return zeros; returns the readers, to be put back."""
        readers, silent = self.readers, SilentReader(self._value_dim)
        self.readers = Readers(values=silent, down=silent)
        return readers


def make_tables(
    run: RunConfig, world: World, in_flight: InFlight, *, draws: bool = True
) -> tuple[list[Table], dict[str, TableAccess]]:
    """Make this rank's shards with their initial values, and the ways to them.

    Args:
        run: the run.
        world: the ranks and groups it runs on.
        in_flight: which micro-batch is being computed.
        draws: whether the shards get values; they are to be filled otherwise.

    Returns:
        The tables in global order, and the access of each memory on this rank's stage by its name.
    """
    tables: list[Table] = []
    access: dict[str, TableAccess] = {}
    number = 0
    for place, (name, config) in enumerate(run.memories.items()):
        mine: dict[str, Table] = {}
        for part_name in config.table_names:
            if world.holds(name) and world.groups is not None:
                mine[part_name] = Table(
                    name=f"{name}.{part_name}",
                    memory=name,
                    config=config,
                    number=number,
                    shard=_make_shard(run, world, name, number, draws=draws),
                    copies=world.groups.copies[place],
                )
            number += 1
        if mine:
            tables += mine.values()
            readers = Readers(**{part: _reader(run, world, name, table.shard) for part, table in mine.items()})
            access[name] = access_through(readers, run, world, name, in_flight)
    return tables, access


def access_through(readers: Readers, run: RunConfig, world: World, memory: str, in_flight: InFlight) -> TableAccess:
    """How the layers of a memory reach its tables, given where rows come from."""
    dp_ranks = [world.placement.grid.dp_rank(member) for member in _members(world)]
    return TableAccess(readers, in_flight, dp_ranks, run.value_dim_of(run.memories[memory]), world.backend, world.marks)


def _make_shard(run: RunConfig, world: World, memory: str, number: int, *, draws: bool) -> ValueShard:
    assert world.groups is not None
    return ValueShard(
        world.placement.memories[memory].plan.part_of(world.groups.memory.rank),
        seed=run.train.seed if draws else None,
        number=number,
        dtype=TORCH_DTYPES[run.table_dtype_of(run.memories[memory])],
        device=world.device,
        deposit_bytes=run.memories[memory].deposit_bytes,
        backend=world.backend,
        marks=world.marks,
    )


def _reader(run: RunConfig, world: World, memory: str, shard: ValueShard) -> RowReader:
    assert world.groups is not None
    group, placement = world.groups.memory, world.placement
    plan = placement.memories[memory].plan
    grid = placement.grid
    reader: RowReader = LocalReader(shard)
    if group.size > 1:
        two = grid.mp_hops == 2
        value_route = (
            TwoHops(plan, world.groups.inside, world.groups.across, backend=world.backend)
            if two
            else OneHop(plan, group, backend=world.backend)
        )
        reader = ShardedReader(shard, plan, group, value_route=value_route, merge=placement.memories[memory].merge)
    if grid.tp > 1 and not run.parallel.sequence_parallel:
        reader = TokenSplitReader(reader, world.groups.tensor, [grid.tp_rank(member) for member in _members(world)])
    return reader


def _members(world: World) -> list[int]:
    """World ranks of this rank's memory-parallel group."""
    grid = world.placement.grid
    groups = grid.memory_groups((grid.stage_of(world.rank),))
    return next(ranks for ranks in groups if world.rank in ranks)
