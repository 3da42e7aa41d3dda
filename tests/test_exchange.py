"""Reading a table that is cut over ranks, between threads and over gloo, against reading it in one piece."""

import itertools
import random
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempar.memory.lookup import LocalReader
from mempar.memory.values import ValueShard
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.cost import exchange_bytes
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.groups import MemoryGroups, make_memory_groups
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.one_hop import OneHop
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan
from mempar.parallel.two_hops import TwoHops
from rank_pool import RankPool
from shards import TESTED
from thread_groups import Threads, owned_entries, plan_of, sent

# (rows, columns, hops)
GRIDS = [(1, 2, 1), (2, 1, 1), (3, 1, 1), (1, 3, 1), (2, 2, 1), (3, 2, 1), (2, 3, 1), (2, 2, 2), (3, 2, 2), (2, 3, 2)]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Two lookups in one table: both forward passes, then both backward passes.

    The first one reads sums of rows, and so does the second, unless it multiplies rows with vectors.

    Attributes:
        plan: cuts of the table.
        tokens: for each layer, tokens of each member.
        reads: M.
        dot: whether the second lookup multiplies.
        hops: of values and output gradients.
        merge: whether duplicates merge.
        tokens_known: whether members are told the others' tokens.
        whole_numbers: values, weights and gradients small enough that no sum is rounded.
        dtype: of the table.
        num_distinct: slots that are read at all.
        seed: of all numbers.
    """

    plan: ShardPlan
    tokens: tuple[tuple[int, ...], ...]
    reads: int
    dot: bool = False
    hops: int = 1
    merge: bool = False
    tokens_known: bool = True
    whole_numbers: bool = False
    dtype: torch.dtype = torch.float64
    num_distinct: int = 10**9
    seed: int = 0

    def numbers(self, draw: torch.Generator, *shape: int) -> Tensor:
        if self.whole_numbers:
            return torch.randint(-3, 4, shape, generator=draw).to(self.dtype)
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype)

    def inputs(self) -> tuple[Tensor, list[list[tuple[Tensor, Tensor, Tensor]]]]:
        """The table, and for each lookup and member slots, what is given (weights or vectors) and output gradients."""
        draw = torch.Generator().manual_seed(self.seed)
        table = self.numbers(draw, self.plan.num_slots, self.plan.value_dim)
        distinct = min(self.num_distinct, self.plan.num_slots)
        chosen = torch.randperm(self.plan.num_slots, generator=draw)[:distinct]
        lookups = []
        for place, counts in enumerate(self.tokens):
            members = []
            for count in counts:
                slots = chosen[torch.randint(distinct, (count, self.reads), generator=draw)]
                # All entries of one token in one row.
                slots[:1] = chosen[0]
                weights = self.numbers(draw, count, self.reads)
                vectors = self.numbers(draw, count, self.plan.value_dim)
                multiplies = self.dot and place == 1
                members.append((slots, vectors, weights) if multiplies else (slots, weights, vectors))
            lookups.append(members)
        return table, lookups

    @property
    def grid(self) -> RankGrid:
        size, rows = self.plan.num_shards, self.plan.num_row_shards
        return RankGrid(world=size, mp=size, mp_rows=rows, mp_hops=self.hops)


@dataclass
class Outcome:
    """What a reader returned: for each lookup outputs and gradients of what was given, and the rows' gradient."""

    outs: list[Tensor]
    given_grads: list[Tensor]
    row_grad: Tensor
    forward_bytes: dict[str, int] = field(default_factory=dict)
    total_bytes: dict[str, int] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [*self.outs, *self.given_grads, self.row_grad]


def read_and_differentiate(
    exchange: Exchange, shard: ValueShard, reader: Any, lookups: list[Any], ledger: ByteLedger
) -> Outcome:
    """Run one member's share of an exchange; `lookups` has (slots, given, gradients, token counts)."""
    given = [lookup[1].clone().requires_grad_() for lookup in lookups]
    calls = [reader.read, reader.dot if exchange.dot else reader.read]
    outs = [call(reader.find(lookups[i][0], lookups[i][3]), given[i]) for i, call in enumerate(calls)]
    forward = sent(ledger)
    assert shard.record_bytes == 0
    torch.autograd.backward(outs, [lookup[2] for lookup in lookups])
    rows, grads = shard.take_gradient()
    dense = torch.zeros(shard.values.shape, dtype=grads.dtype).index_copy(0, rows.long(), grads)
    return Outcome([out.detach() for out in outs], [number.grad for number in given], dense, forward, sent(ledger))


def read_as_member(exchange: Exchange, groups: MemoryGroups) -> Outcome:
    plan, rank = exchange.plan, groups.memory.rank
    table, lookups = exchange.inputs()
    part = plan.part_of(rank)
    shard = ValueShard(part, seed=5, dtype=exchange.dtype, device=torch.device("cpu"), backend=TESTED)
    shard.values.copy_(table[part.row_start : part.row_end, part.column_start : part.column_end])
    if exchange.hops == 1:
        value_route = OneHop(plan, groups.memory, backend=TESTED)
    else:
        value_route = TwoHops(plan, groups.inside, groups.across, backend=TESTED)
    reader = ShardedReader(shard, plan, groups.memory, value_route=value_route, merge=exchange.merge)
    mine = [
        (*members[rank], list(counts) if exchange.tokens_known else None)
        for members, counts in zip(lookups, exchange.tokens, strict=True)
    ]
    return read_and_differentiate(exchange, shard, reader, mine, groups.ledger)


def read_whole(exchange: Exchange) -> list[Outcome]:
    """What every member should see, from one reader with the whole table."""
    table, lookups = exchange.inputs()
    whole = replace(exchange.plan, num_row_shards=1, num_column_shards=1).part_of(0)
    shard = ValueShard(whole, seed=5, dtype=exchange.dtype, device=torch.device("cpu"))
    shard.values.copy_(table)
    joined = [(*(torch.cat(parts) for parts in zip(*members, strict=True)), None) for members in lookups]
    found = read_and_differentiate(exchange, shard, LocalReader(shard), joined, ByteLedger())
    outs = [out.split(counts) for out, counts in zip(found.outs, exchange.tokens, strict=True)]
    grads = [grad.split(counts) for grad, counts in zip(found.given_grads, exchange.tokens, strict=True)]
    outcomes = []
    for rank in range(exchange.plan.num_shards):
        part = exchange.plan.part_of(rank)
        row_grad = found.row_grad[part.row_start : part.row_end, part.column_start : part.column_end]
        outcomes.append(Outcome([out[rank] for out in outs], [grad[rank] for grad in grads], row_grad))
    return outcomes


def assert_bytes_are_predicted(exchange: Exchange, outcomes: list[Outcome]) -> None:
    _, lookups = exchange.inputs()
    known = {"reads": exchange.reads, "value_bytes": exchange.dtype.itemsize, "tokens_known": exchange.tokens_known}
    ways = {"hops": exchange.hops, "merged": exchange.merge}
    for rank, outcome in enumerate(outcomes):
        predicted: Counter[str] = Counter()
        for members, counts in zip(lookups, exchange.tokens, strict=True):
            owned = owned_entries(exchange.plan, [slots for slots, _, _ in members], merged=exchange.merge)
            predicted.update(asdict(exchange_bytes(exchange.plan, rank, owned, list(counts), **known, **ways)))
        assert {phase: count for phase, count in predicted.items() if count} == {
            phase: count for phase, count in outcome.total_bytes.items() if count
        }
        if not exchange.dot:
            assert set(outcome.forward_bytes) <= {"split_sizes", "entries", "values", "values_inside", "values_across"}


def random_tokens(rng: random.Random, size: int) -> tuple[tuple[int, ...], ...]:
    """Two lookups: uneven tokens and a member without any; in the second one, one member has all tokens."""
    counts = [[rng.randint(0, 5) for _ in range(size)], [0] * size]
    counts[0][rng.randrange(size)], counts[1][rng.randrange(size)] = 0, 4
    return tuple(map(tuple, counts))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}-{grid[2]}hop")
@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(("tokens_known", "reads"), [(True, 6), (False, 6), (True, 256)])
def test_sharded_reader_matches_local_reader(
    in_threads: Threads, rng: random.Random, grid: tuple[int, int, int], merge: bool, tokens_known: bool, reads: int
) -> None:
    plan = plan_of(*grid[:2])
    exchange = Exchange(
        plan=plan,
        tokens=random_tokens(rng, plan.num_shards),
        reads=reads,
        dot=rng.random() < 0.5,
        hops=grid[2],
        merge=merge,
        tokens_known=tokens_known,
        seed=rng.randrange(10**6),
    )
    outcomes = in_threads.grid(exchange.grid, lambda groups: read_as_member(exchange, groups))
    for found, expected in zip(outcomes, read_whole(exchange), strict=True):
        for tensor, other in zip(found.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-12)
    assert_bytes_are_predicted(exchange, outcomes)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    """Any exchange of small whole numbers, in which no sum is rounded."""
    hops = draw(st.sampled_from([1, 2]))
    rows, columns = draw(st.integers(hops, 4)), draw(st.integers(hops, 3))
    tile = draw(st.integers(1, 3))
    plan = plan_of(
        rows,
        columns,
        num_slots=draw(st.integers(rows, 30)),
        value_dim=draw(st.integers(tile * (columns - 1) + 1, tile * columns + 5)),
        tile=tile,
    )
    counts = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=plan.num_shards, max_size=plan.num_shards).map(tuple)
    return Exchange(
        plan=plan,
        tokens=draw(st.tuples(counts, counts)),
        reads=draw(st.integers(1, 9)),
        dot=draw(st.booleans()),
        hops=hops,
        merge=draw(st.booleans()),
        tokens_known=draw(st.booleans()),
        whole_numbers=True,
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        num_distinct=draw(st.sampled_from([1, 3, 100])),
        seed=draw(st.integers(0, 10**6)),
    )


# One token on the last of six ranks; none at all.
LONE = Exchange(plan=plan_of(3, 2), tokens=((0, 0, 0, 0, 0, 1), (0,) * 6), reads=4, hops=2, whole_numbers=True)


@settings(deadline=None, max_examples=50)
@given(exchanges())
@example(LONE)
@example(replace(LONE, merge=True, tokens_known=False, dot=True))
@example(replace(LONE, plan=plan_of(2, 3), merge=True))
@example(replace(LONE, plan=plan_of(1, 6, value_dim=11), hops=1, merge=True))
def test_exchange_of_whole_numbers_is_bitwise_that_of_one_rank(in_threads: Threads, exchange: Exchange) -> None:
    outcomes = in_threads.grid(exchange.grid, lambda groups: read_as_member(exchange, groups))
    for found, expected in zip(outcomes, read_whole(exchange), strict=True):
        for tensor, other in zip(found.tensors(), expected.tensors(), strict=True):
            assert torch.equal(tensor, other)
    assert_bytes_are_predicted(exchange, outcomes)


@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("rows_columns", [(2, 2), (3, 2), (2, 3), (4, 3)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_hops_are_bitwise_one_hop(
    in_threads: Threads, rng: random.Random, rows_columns: tuple[int, int], merge: bool, dtype: torch.dtype
) -> None:
    plan = plan_of(*rows_columns)
    tokens = random_tokens(rng, plan.num_shards)
    one_hop = Exchange(plan=plan, tokens=tokens, reads=8, dot=True, merge=merge, dtype=dtype, seed=rng.randrange(10**6))
    runs = {}
    for hops in (1, 2):
        exchange = replace(one_hop, hops=hops)
        runs[hops] = in_threads.grid(exchange.grid, lambda groups, exchange=exchange: read_as_member(exchange, groups))
    for found, expected in zip(runs[2], runs[1], strict=True):
        for tensor, other in zip(found.tensors(), expected.tensors(), strict=True):
            assert torch.equal(tensor, other)


def read_on_ranks(exchanges: list[Exchange]) -> list[Outcome]:
    """Run exchanges over gloo, as this rank of the world."""
    outcomes = []
    for grid, some in itertools.groupby(exchanges, lambda exchange: exchange.grid):
        groups, made = make_memory_groups(grid, dist.get_rank(), [(0,)], None)
        for exchange in some:
            groups.ledger.clear()
            outcomes.append(read_as_member(exchange, groups))
        for group in made:
            dist.destroy_process_group(group)
    return outcomes


@pytest.mark.parametrize(
    ("world", "grids"),
    [(3, [(3, 1, 1), (1, 3, 1)]), (4, [(2, 2, 2)]), (6, [(3, 2, 1), (3, 2, 2), (2, 3, 2), (6, 1, 1), (1, 6, 1)])],
)
def test_exchange_over_gloo_is_bitwise_that_of_one_rank(
    pool: RankPool, rng: random.Random, world: int, grids: list[tuple[int, int, int]]
) -> None:
    exchanges = [
        Exchange(
            # 25 slots and 11 columns, which 2, 3 and 6 do not divide.
            plan=plan_of(rows, columns, value_dim=11),
            tokens=random_tokens(rng, world),
            reads=6,
            dot=True,
            hops=hops,
            merge=merge,
            whole_numbers=True,
            dtype=torch.float32,
            num_distinct=12,
            seed=rng.randrange(10**6),
        )
        for rows, columns, hops in grids
        for merge in (False, True)
    ]
    by_rank = pool.run(world, read_on_ranks, exchanges)
    for place, exchange in enumerate(exchanges):
        outcomes = [outcomes[place] for outcomes in by_rank]
        for found, expected in zip(outcomes, read_whole(exchange), strict=True):
            for tensor, other in zip(found.tensors(), expected.tensors(), strict=True):
                assert torch.equal(tensor, other)
        assert_bytes_are_predicted(exchange, outcomes)


def test_reader_and_hops_refuse_groups_of_another_size() -> None:
    alone = MemberGroup(None, ByteLedger())
    with pytest.raises(ValueError, match=r"4 shards .* 1 members"):
        ShardedReader(SimpleNamespace(), plan_of(2, 2), alone)
    with pytest.raises(ValueError, match=r"\(2, 3\) row and column shards .* 1 and 1"):
        TwoHops(plan_of(2, 3), alone, alone)
