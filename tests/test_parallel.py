"""Memory parallelism without processes: cuts, groups, routes, bytes, and the exchange between threads."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mempar.errors import ConfigError
from mempar.memory.lookup import LocalReader
from mempar.memory.values import ValueShard
from mempar.parallel import collectives
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.cost import columns_send_fewer_bytes, copy_sync_bytes, exchange_bytes, token_split_bytes
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.gradsync import sum_over_copies
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.ranks import RankGrid
from mempar.parallel.routing import count_dtype, route
from mempar.parallel.shard_plan import ShardPlan
from mempar.parallel.token_split import TokenSplitReader

GLOO_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
GRIDS = [(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (3, 2), (2, 3)]


@pytest.fixture(autouse=True)
def rng() -> random.Random:
    seed = torch.seed()
    # Shown by pytest when a test fails; torch.manual_seed(it) and random.Random(it) repeat the test.
    print(f"torch and random seed {seed}")
    return random.Random(seed)


def plan_of(num_rows: int, num_columns: int, num_slots: int = 25, value_dim: int = 7, tile: int = 2) -> ShardPlan:
    return ShardPlan(
        num_slots=num_slots,
        value_dim=value_dim,
        column_tile=tile,
        num_row_shards=num_rows,
        num_column_shards=num_columns,
    )


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def random_grid(rng: random.Random) -> tuple[RankGrid, tuple[int, ...]]:
    """A grid, and stages that hold a table."""
    tp, cp, pp, dp = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
    mp = rng.choice(divisors(tp * cp * dp))
    stages = tuple(sorted(rng.sample(range(pp), rng.randint(1, pp))))
    mp_rows = rng.choice(divisors(mp))
    return RankGrid(world=tp * cp * pp * dp, tp=tp, cp=cp, pp=pp, mp=mp, mp_rows=mp_rows), stages


def test_rank_grid_numbers_ranks_as_megatron_does(rng: random.Random) -> None:
    for grid, _ in (random_grid(rng) for _ in range(50)):
        places = itertools.product(range(grid.pp), range(grid.dp), range(grid.cp), range(grid.tp))
        for rank, (stage, dp_rank, _, tp_rank) in enumerate(places):
            assert (grid.stage_of(rank), grid.dp_rank(rank), grid.tp_rank(rank)) == (stage, dp_rank, tp_rank)
        assert rank == grid.world - 1
        assert grid.mp_columns * grid.mp_rows == grid.mp


def test_memory_groups_are_disjoint_and_cover_the_stages_of_the_table(rng: random.Random) -> None:
    for grid, stages in (random_grid(rng) for _ in range(100)):
        groups = grid.memory_groups(stages)
        ranks = [rank for group in groups for rank in group]
        assert sorted(ranks) == [rank for rank in range(grid.world) if grid.stage_of(rank) in stages]
        for group in groups:
            assert len({grid.stage_of(rank) for rank in group}) == 1
            assert [grid.memory_rank(rank) for rank in group] == list(range(grid.mp))


def test_copy_groups_hold_equal_shards_and_cover_all_memory_groups(rng: random.Random) -> None:
    for grid, stages in (random_grid(rng) for _ in range(100)):
        groups, copies = grid.memory_groups(stages), grid.copy_groups(stages)
        assert [{grid.memory_rank(rank) for rank in ranks} for ranks in copies] == [{s} for s in range(grid.mp)]
        assert sorted(rank for ranks in copies for rank in ranks) == sorted(rank for group in groups for rank in group)
        for ranks, group in itertools.product(copies, groups):
            assert len(set(ranks) & set(group)) == 1


def test_rank_grid_has_no_groups_without_a_table() -> None:
    grid = RankGrid(world=8, tp=2, pp=2)
    assert grid.memory_groups(()) == grid.copy_groups(()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 6, "tp": 2, "pp": 2}, r"6 ranks .*tp=2 x cp=1 x pp=2 = 4"),
        ({"world": 4, "tp": 8}, r"4 ranks .*tp=8 "),
        ({"world": 8, "tp": 2, "pp": 2, "mp": 3}, r"parallel\.mp=3 .*2\*1\*2 = 4 on 8 ranks.*parallel\.mp=1, 2, 4,"),
        ({"world": 2, "mp": 4}, r"parallel\.mp=4 .* = 2 on 2 ranks"),
        ({"world": 6, "mp": 6, "mp_rows": 4}, r"parallel\.mp_rows=4 .*parallel\.mp=6"),
    ],
)
def test_rank_grid_refuses_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankGrid(**sizes)


def test_shard_plan_cuts_the_table_without_gap_or_overlap(rng: random.Random) -> None:
    shapes = [(25, 7, 2, 3, 3), (10, 9, 4, 3, 3), (9, 6, 1, 1, 6), (7, 300, 128, 7, 3)]
    for _ in range(60):
        tile, tiles, num_slots = rng.randint(1, 5), rng.randint(1, 8), rng.randint(1, 30)
        value_dim = tile * tiles - rng.randrange(tile)
        shapes.append((num_slots, value_dim, tile, rng.randint(1, min(5, num_slots)), rng.randint(1, tiles)))
    for num_slots, value_dim, tile, num_rows, num_columns in shapes:
        plan = plan_of(num_rows, num_columns, num_slots, value_dim, tile)
        parts = [plan.part_of(member) for member in range(plan.num_shards)]
        holders = torch.zeros(num_slots, value_dim, dtype=torch.int64)
        for member, part in enumerate(parts):
            holders[part.row_start : part.row_end, part.column_start : part.column_end] += 1
            assert part.num_rows > 0 and part.num_columns > 0
            assert part.column_start % tile == 0
            assert part.column_end % tile == 0 or part.column_end == value_dim
            assert (part.num_slots, part.value_dim) == (num_slots, value_dim)
            # Rows are fastest.
            assert (plan.row_shard(member), plan.column_shard(member)) == (member % num_rows, member // num_rows)
            assert plan.columns_of(member) == (part.column_start, part.column_end)
            assert plan.row_cuts[member % num_rows] == part.row_start
        assert bool((holders == 1).all())
        assert len(parts) == num_rows * num_columns
        rows, tiles = [part.num_rows for part in parts], [-(-part.num_columns // tile) for part in parts]
        assert max(rows) - min(rows) <= 1 and max(tiles) - min(tiles) <= 1


def test_shard_plan_refuses_shards_without_rows_or_columns() -> None:
    with pytest.raises(ConfigError, match=r"3 column shards .* 256 wide has 2 of memory\.column_tile=128"):
        plan_of(1, 3, 25, 256, 128)
    with pytest.raises(ConfigError, match=r"10 row shards exceed the 9 slots"):
        plan_of(10, 1, 9)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize(("num_tokens", "reads"), [(0, 4), (1, 1), (5, 6), (2, 255), (2, 256)])
def test_route_matches_brute_force(rng: random.Random, num_shards: int, num_tokens: int, reads: int) -> None:
    num_slots = 23
    cuts = [0, *sorted(rng.sample(range(1, num_slots), num_shards - 1)), num_slots]
    slot = torch.randint(num_slots, (num_tokens, reads))
    # The first and last rows of the shards, where a cut could be off by one.
    bounds = torch.tensor([*cuts[:-1], *(cut - 1 for cut in cuts[1:])])
    slot[:, : len(bounds)] = bounds[:reads]
    weight = torch.randn(num_tokens, reads)
    routed = route(slot, cuts)
    sorted_weight = routed.sort(weight.flatten())
    rows, weights, counts = routed.row_index.split(routed.sizes), sorted_weight.split(routed.sizes), []
    for shard, (start, end) in enumerate(itertools.pairwise(cuts)):
        mine = [
            (token, read) for token in range(num_tokens) for read in range(reads) if start <= slot[token, read] < end
        ]
        assert rows[shard].tolist() == [int(slot[place]) - start for place in mine]
        assert weights[shard].tolist() == [float(weight[place]) for place in mine]
        owned = Counter(token for token, _ in mine)
        counts.append([owned[token] for token in range(num_tokens)])
    assert routed.row_index.dtype == torch.int32
    assert torch.equal(routed.unsort(sorted_weight), weight.flatten())
    if num_shards == 1:
        assert routed.counts is None
    else:
        assert routed.counts.tolist() == counts
        assert routed.counts.dtype == count_dtype(reads)


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


def test_gloo_carries_what_threads_carry() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype in GLOO_DTYPES:
            received = torch.zeros(3, dtype=dtype)
            dist.all_to_all_single(received, torch.arange(3).to(dtype), [3], [3])
            assert received.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()


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


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[MemberGroup], object]], list]:
    """Runs work(group) as every member of a group; returns what the members return."""
    fake = SimpleNamespace(
        get_rank=lambda group: group.rank,
        get_world_size=lambda group: group.wire.size,
        all_to_all_single=all_to_all_between_threads,
    )
    monkeypatch.setattr(collectives, "dist", fake)

    def run(size: int, work: Callable[[MemberGroup], object]) -> list:
        wire = Wire(size)

        def member(rank: int) -> object:
            try:
                return work(MemberGroup(ThreadGroup(wire, rank), ByteLedger()))
            except BaseException:
                wire.barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(member, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    return run


def sent(ledger: ByteLedger) -> dict[str, int]:
    return dict(ledger.sent_bytes)


def owned_entries(plan: ShardPlan, slots: list[Tensor]) -> list[list[int]]:
    """n[r][i]: entries of member r that row shard i owns."""
    spans = list(itertools.pairwise(plan.row_cuts))
    return [[int(((slot >= start) & (slot < end)).sum()) for start, end in spans] for slot in slots]


@pytest.mark.parametrize("num_rows_columns", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("tokens_known", [True, False])
@pytest.mark.parametrize("reads", [6, 256])
def test_sharded_reader_matches_local_reader(
    in_threads: Callable, rng: random.Random, num_rows_columns: tuple[int, int], tokens_known: bool, reads: int
) -> None:
    plan = plan_of(*num_rows_columns)
    size, part = plan.num_shards, plan_of(1, 1).part_of(0)
    device, dtype = torch.device("cpu"), torch.float64
    # Two layers read the table before either is differentiated; in the second one, one member has all tokens.
    counts = [[rng.randint(0, 5) for _ in range(size)], [0] * size]
    counts[0][rng.randrange(size)], counts[1][rng.randrange(size)] = 0, 4
    slots = [[torch.randint(25, (count, reads)) for count in layer] for layer in counts]
    # All entries of one token in one row.
    for layer in slots:
        for slot in layer:
            slot[:1] = rng.randrange(25)
    weights = [[torch.randn(slot.shape, dtype=dtype) for slot in layer] for layer in slots]
    grads = [[torch.randn(len(slot), 7, dtype=dtype) for slot in layer] for layer in slots]

    whole = ValueShard(part, seed=5, dtype=dtype, device=device)
    expected, expected_grads = [], []
    for layer in range(2):
        weight = torch.cat(weights[layer]).requires_grad_()
        out = LocalReader(whole).read(torch.cat(slots[layer]), weight)
        out.backward(torch.cat(grads[layer]))
        expected.append(out.detach().split(counts[layer]))
        expected_grads.append(weight.grad.split(counts[layer]))
    rows, row_grads = whole.take_gradient()
    table_grad = torch.zeros(25, 7, dtype=dtype).index_copy(0, rows.long(), row_grads)

    def work(group: MemberGroup) -> tuple:
        shard = ValueShard(plan.part_of(group.rank), seed=5, dtype=dtype, device=device)
        reader = ShardedReader(shard, plan, group)
        mine = [weights[layer][group.rank].clone().requires_grad_() for layer in range(2)]
        outs = [
            reader.read(slots[layer][group.rank], mine[layer], counts[layer] if tokens_known else None)
            for layer in range(2)
        ]
        forward = sent(group.ledger)
        assert shard.record_bytes == 0
        torch.autograd.backward(outs, [grads[layer][group.rank] for layer in range(2)])
        weight_grads = [weight.grad for weight in mine]
        return [out.detach() for out in outs], weight_grads, shard.take_gradient(), forward, sent(group.ledger)

    for rank, (outs, weight_grads, (rows, row_grads), forward, total) in enumerate(in_threads(size, work)):
        for layer in range(2):
            torch.testing.assert_close(outs[layer], expected[layer][rank], rtol=0, atol=1e-12)
            torch.testing.assert_close(weight_grads[layer], expected_grads[layer][rank], rtol=0, atol=1e-12)
        held = plan.part_of(rank)
        dense = torch.zeros(held.num_rows, held.num_columns, dtype=dtype).index_copy(0, rows.long(), row_grads)
        share = table_grad[held.row_start : held.row_end, held.column_start : held.column_end]
        torch.testing.assert_close(dense, share, rtol=0, atol=1e-12)
        predicted: Counter[str] = Counter()
        for layer in range(2):
            owned = owned_entries(plan, slots[layer])
            known = {"reads": reads, "value_bytes": 8, "tokens_known": tokens_known}
            predicted.update(asdict(exchange_bytes(plan, rank, owned, counts[layer], **known)))
        assert dict(predicted) == {phase: total.get(phase, 0) for phase in predicted}
        assert set(total) <= set(predicted)
        assert set(forward) <= {"split_sizes", "entries", "values"}


def test_sharded_reader_refuses_a_group_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"4 shards .* 1 members"):
        ShardedReader(SimpleNamespace(), plan_of(2, 2), MemberGroup(None, ByteLedger()))


def brute_force_bytes(
    shards: tuple[int, int], table: tuple[int, int, int], slots: list[list[list[int]]], value_bytes: int, known: bool
) -> list[dict[str, int]]:
    """Counts, for every member, what the protocol makes it send: entry by entry, sum by sum."""
    (num_rows, num_columns), (num_slots, value_dim, tile) = shards, table
    tiles = torch.arange(value_dim).split(tile)
    columns = [sum(len(tiles[i]) for i in part) for part in torch.arange(len(tiles)).tensor_split(num_columns)]
    owner = {int(s): i for i, part in enumerate(torch.arange(num_slots).tensor_split(num_rows)) for s in part}
    reads = max((len(token) for tokens in slots for token in tokens), default=1)
    sent = [Counter() for _ in slots]
    for sender, receiver in itertools.permutations(range(len(slots)), 2):
        # A count of entries where they are not fixed; a count of tokens where it is not known.
        sent[sender]["split_sizes"] += 8 * (num_rows > 1) + 8 * (not known)
        for token in slots[sender]:
            # The receiver learns how many of the token's entries are its own, and gets these.
            sent[sender]["entries"] += (1 if reads <= 255 else 2) * (num_rows > 1)
            for slot in token:
                sent[sender]["entries"] += (4 + value_bytes) * (owner[slot] == receiver % num_rows)
            sent[sender]["output_grads"] += columns[receiver // num_rows] * value_bytes
        for token in slots[receiver]:
            # The sender answers with a sum, and in backward with a gradient for each entry that it got.
            sent[sender]["values"] += columns[sender // num_rows] * value_bytes
            sent[sender]["score_grads"] += sum(owner[slot] == sender % num_rows for slot in token) * value_bytes
    return [dict(counted) for counted in sent]


def test_exchange_bytes_match_brute_force_on_random_grids(rng: random.Random) -> None:
    for _ in range(250):
        shards = num_rows, num_columns = rng.randint(1, 4), rng.randint(1, 4)
        tile, num_slots = rng.randint(1, 3), rng.randint(num_rows, 20)
        value_dim = rng.randint(tile * (num_columns - 1) + 1, tile * num_columns + 7)
        plan = plan_of(num_rows, num_columns, num_slots, value_dim, tile)
        reads, value_bytes, known = rng.choice([1, 2, 5, 255, 256]), rng.choice([2, 4, 8]), rng.random() < 0.5
        counts = [rng.choice([0, 1, 2, 3] if reads < 255 else [0, 1]) for _ in range(plan.num_shards)]
        counts[rng.randrange(plan.num_shards)] += 1
        slots = [[[rng.randrange(num_slots) for _ in range(reads)] for _ in range(count)] for count in counts]
        owned = owned_entries(plan, [torch.tensor(tokens) for tokens in slots])
        expected = brute_force_bytes(shards, (num_slots, value_dim, tile), slots, value_bytes, known)
        for rank in range(plan.num_shards):
            given = {"reads": reads, "value_bytes": value_bytes, "tokens_known": known}
            predicted = asdict(exchange_bytes(plan, rank, owned, counts, **given))
            assert predicted == {phase: expected[rank].get(phase, 0) for phase in predicted}


def test_columns_send_fewer_bytes_agrees_with_the_sum_of_formulas(rng: random.Random) -> None:
    answers = set()
    for _ in range(300):
        size, num_tokens = rng.randint(2, 6), rng.randint(1, 4)
        value_dim, reads = size * rng.randint(1, 40), size * rng.randint(1, 40)
        value_bytes = rng.choice([2, 4, 8])
        totals = {}
        for shards in ((size, 1), (1, size)):
            plan = plan_of(*shards, num_slots=size, value_dim=value_dim, tile=1)
            # Slots are spread evenly, so that a row shard owns an equal part of every rank's entries.
            owned = [[num_tokens * reads // shards[0]] * shards[0] for _ in range(size)]
            given = {"reads": reads, "value_bytes": value_bytes}
            phases = asdict(exchange_bytes(plan, 0, owned, [num_tokens] * size, **given))
            # The rule leaves out what rows say about sizes and counts, a byte or so a token.
            counts = 0 if shards[0] == 1 else (1 + (reads > 255)) * num_tokens * (size - 1)
            totals[shards] = sum(phases.values()) - phases["split_sizes"] - counts
        answer = columns_send_fewer_bytes(value_dim=value_dim, reads=reads, value_bytes=value_bytes)
        assert answer == (totals[1, size] < totals[size, 1])
        answers.add(answer)
    assert answers == {True, False}


def test_sum_over_copies_of_one_changes_and_sends_nothing() -> None:
    group = MemberGroup(None, ByteLedger())
    rows, grad = torch.tensor([1, 4], dtype=torch.int32), torch.randn(2, 3)
    same_rows, same_grad = sum_over_copies(rows, grad, group)
    assert torch.equal(same_rows, rows) and torch.equal(same_grad, grad)
    assert sent(group.ledger) == {}
    assert copy_sync_bytes(1, 2, num_columns=3, grad_bytes=4) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_over_copies_is_bitwise_the_same_on_all_of_them(in_threads: Callable, dtype: torch.dtype) -> None:
    # The first row only on member 0, none on member 1, shared ones on the others.
    rows = [torch.tensor(touched, dtype=torch.int32) for touched in ([0, 3, 5], [], [3, 5, 9], [3, 7])]
    grads = [torch.randn(len(touched), 33, dtype=dtype) for touched in rows]

    def work(group: MemberGroup) -> tuple:
        union, total = sum_over_copies(rows[group.rank], grads[group.rank], group)
        return union, total, sent(group.ledger)

    dense = torch.zeros(10, 33, dtype=torch.float64)
    for touched, grad in zip(rows, grads, strict=True):
        dense.index_add_(0, touched, grad.double())
    results = in_threads(4, work)
    for rank, (union, total, bytes_sent) in enumerate(results):
        assert union.tolist() == [0, 3, 5, 7, 9]
        assert torch.equal(total, results[0][1])
        # Three terms of size one.
        torch.testing.assert_close(total.double(), dense[union.long()], rtol=0, atol=20 * torch.finfo(dtype).eps)
        expected = copy_sync_bytes(4, len(rows[rank]), num_columns=33, grad_bytes=dtype.itemsize)
        assert bytes_sent == {"copy_sync": expected}
        assert expected == 3 * (8 + len(rows[rank]) * (4 + 33 * dtype.itemsize))


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 6])
def test_token_split_reads_as_one_rank_would(in_threads: Callable, tp: int, num_tokens: int) -> None:
    part, dtype, reads = plan_of(1, 1).part_of(0), torch.float64, 4
    slot, weight = torch.randint(25, (num_tokens, reads)), torch.randn(num_tokens, reads, dtype=dtype)
    grad = torch.randn(num_tokens, 7, dtype=dtype)

    def read(reader_of: Callable[[LocalReader], object]) -> tuple[Tensor, Tensor, Tensor]:
        shard = ValueShard(part, seed=5, dtype=dtype, device=torch.device("cpu"))
        mine = weight.clone().requires_grad_()
        out = reader_of(LocalReader(shard)).read(slot, mine, [num_tokens] * tp)
        out.backward(grad)
        rows, row_grads = shard.take_gradient()
        return out.detach(), mine.grad, torch.zeros(25, 7, dtype=dtype).index_copy(0, rows.long(), row_grads)

    def work(group: MemberGroup) -> tuple:
        members = list(range(group.size))
        return *read(lambda inner: TokenSplitReader(inner, group, members)), sent(group.ledger)

    out, weight_grad, table_grad = read(lambda inner: inner)
    results = in_threads(tp, work)
    # Every rank deposits for its own tokens only.
    torch.testing.assert_close(sum(result[2] for result in results), table_grad, rtol=0, atol=1e-12)
    shares = [len(share) for share in torch.arange(num_tokens).tensor_split(tp)]
    for rank, (split_out, split_grad, _, bytes_sent) in enumerate(results):
        torch.testing.assert_close(split_out, out, rtol=0, atol=1e-12)
        torch.testing.assert_close(split_grad, weight_grad, rtol=0, atol=1e-12)
        given = {"value_dim": 7, "reads": reads, "value_bytes": 8, "score_bytes": 8}
        expected = dict(
            zip(("token_gather", "score_gather"), token_split_bytes(tp, shares[rank], **given), strict=True)
        )
        assert bytes_sent == expected
        assert expected["token_gather"] == (tp - 1) * shares[rank] * 7 * 8
        assert expected["score_gather"] == (tp - 1) * shares[rank] * reads * 8


def test_token_split_tells_the_inner_reader_each_members_share() -> None:
    seen = []

    def record(slot: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        seen.append(counts)
        return weight @ weight.new_ones(weight.shape[1], 7)

    group = SimpleNamespace(size=3, rank=1, share=lambda part, sizes, phase: part)
    reader = TokenSplitReader(SimpleNamespace(read=record), group, [0, 1, 2, 0, 1, 2])
    reader.read(torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 4), [8, 8, 8, 4, 4, 4])
    assert seen == [[3, 3, 2, 2, 1, 1]]


def test_ledger_counts_bytes_and_calls_until_cleared() -> None:
    ledger = ByteLedger()
    for phase, num_bytes in (("values", 3), ("entries", 0), ("values", 4)):
        ledger.add(phase, num_bytes)
    assert (sent(ledger), dict(ledger.calls)) == ({"values": 7, "entries": 0}, {"values": 2, "entries": 1})
    ledger.clear()
    assert sum(ledger.sent_bytes.values()) == ledger.calls.total() == 0
