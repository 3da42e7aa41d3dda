"""Time of an exchange: its bytes pair by pair, and what it is made of."""

import math
import random
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest

from mempar.parallel.collective_time import all_to_all_us
from mempar.parallel.cost import ExchangeBytes, exchange_bytes
from mempar.parallel.exchange_time import even_exchange_us, exchange_calls, exchange_us
from mempar.parallel.links import Link, Topology
from mempar.parallel.shard_plan import ShardPlan
from thread_groups import plan_of

PHASES = [field.name for field in fields(ExchangeBytes)]
TWO_NODES = Topology(
    inside=Link(latency_us=2.0, gb_per_s=100.0),
    across=Link(latency_us=10.0, gb_per_s=10.0),
    ranks_per_node=2,
    node_gb_per_s=15.0,
)
FREE = Link(latency_us=0.0, gb_per_s=math.inf)


def random_exchange(rng: random.Random) -> tuple[ShardPlan, list[list[int]], list[int], dict[str, Any]]:
    """A plan, owned entries, token counts, and how they travel: rows, columns, grids, in one hop or two."""
    hops = rng.choice([1, 2])
    num_rows, num_columns = rng.randint(hops, 4), rng.randint(hops, 4)
    tile = rng.randint(1, 3)
    value_dim = rng.randint(tile * (num_columns - 1) + 1, tile * num_columns + 7)
    plan = plan_of(num_rows, num_columns, rng.randint(num_rows, 30), value_dim, tile)
    ways = {"reads": rng.choice([1, 5, 255, 256]), "value_bytes": rng.choice([2, 4, 8]), "hops": hops}
    ways |= {name: rng.random() < 0.5 for name in ("tokens_known", "merged", "products", "recomputed")}
    counts = [rng.choice([0, 1, 2, 9]) for _ in range(plan.num_shards)]
    # Merging leaves fewer entries than reads, spread over row shards in any way.
    owned = [[0] * num_rows for _ in counts]
    for member, count in enumerate(counts):
        for _ in range(count * ways["reads"]):
            owned[member][rng.randrange(num_rows)] += 1 if not ways["merged"] else rng.random() < 0.7
    return plan, owned, counts, ways


def test_bytes_of_pairs_add_up_to_those_of_members(rng: random.Random) -> None:
    seen: Counter[str] = Counter()
    for _ in range(300):
        plan, owned, counts, ways = random_exchange(rng)
        calls = exchange_calls(plan, owned, counts, **ways)
        for rank in range(plan.num_shards):
            sent: Counter[str] = Counter()
            for call in calls:
                assert call.sent_bytes[rank, rank] == 0
                sent[call.phase] += int(call.sent_bytes[rank].sum())
            expected = asdict(exchange_bytes(plan, rank, owned, counts, **ways))
            assert {phase: sent[phase] for phase in PHASES} == expected
            assert set(sent) <= set(PHASES)
            seen.update(phase for phase in expected if expected[phase])
    assert set(seen) == set(PHASES)


def test_what_is_sent_is_what_others_expect(rng: random.Random) -> None:
    # A receiver's own view, in the sizes of parallel/exchange.py, one_hop.py and two_hops.py.
    for _ in range(100):
        plan, owned, counts, ways = random_exchange(rng)
        ways |= {"products": False, "recomputed": False}
        received = dict.fromkeys(PHASES, np.zeros(plan.num_shards, dtype=np.int64))
        for call in exchange_calls(plan, owned, counts, **ways):
            received[call.phase] = received[call.phase] + call.sent_bytes.sum(0)
        for q in range(plan.num_shards):
            width, others = plan.part_of(q).num_columns, sum(counts) - counts[q]
            entries = sum(owned[p][plan.row_shard(q)] for p in range(plan.num_shards) if p != q)
            counted = plan.num_row_shards > 1 or ways["merged"]
            count_bytes = counted * (1 if ways["reads"] <= 255 else 2)
            assert received["entries"][q] == (4 + ways["value_bytes"]) * entries + count_bytes * others
            gradients = received["output_grads"][q] + received["output_grads_inside"][q]
            gradients += received["output_grads_across"][q]
            # In two hops, too, every gradient's slice enters a rank once.
            assert gradients == ways["value_bytes"] * width * others


def test_many_exchanges_are_listed_like_one(rng: random.Random) -> None:
    for _ in range(30):
        plan, owned, counts, ways = random_exchange(rng)
        others = [[count + rng.randint(0, 3) for count in counts] for _ in range(3)]
        together = exchange_calls(plan, np.array([owned] * 3), np.array(others), **ways)
        for i, token_counts in enumerate(others):
            alone = exchange_calls(plan, owned, token_counts, **ways)
            assert [(call.phase, call.backward) for call in together] == [(call.phase, call.backward) for call in alone]
            for one, all_of_them in zip(alone, together, strict=True):
                assert (one.sent_bytes == all_of_them.sent_bytes[i]).all()


def test_time_is_that_of_the_collectives_in_order(rng: random.Random) -> None:
    for _ in range(50):
        plan, owned, counts, ways = random_exchange(rng)
        members = rng.sample(range(16), plan.num_shards)
        times = exchange_us(TWO_NODES, plan, members, owned, counts, **ways)
        calls = exchange_calls(plan, owned, counts, **ways)
        priced = [(call, all_to_all_us(TWO_NODES, members, call.sent_bytes.tolist())) for call in calls]
        assert times.forward == pytest.approx(sum(spent for call, spent in priced if not call.backward))
        assert times.backward == pytest.approx(sum(spent for call, spent in priced if call.backward))
        assert times.total == pytest.approx(sum(getattr(times, phase) for phase in PHASES))
        free = replace(TWO_NODES, inside=FREE, across=FREE, node_gb_per_s=math.inf)
        assert exchange_us(free, plan, members, owned, counts, **ways).total == 0.0


def test_two_hops_cross_nodes_with_fewer_bytes() -> None:
    # Two nodes of two, rows inside a node, 512 wide in float32: what crosses is bound by 7.5 GB/s a rank.
    plan = plan_of(2, 2, num_slots=1024, value_dim=512, tile=1)
    counts, owned = [1000] * 4, [[4000, 4000]] * 4
    given = {"reads": 8, "value_bytes": 4}
    members = [0, 1, 2, 3]
    one, two = (exchange_us(TWO_NODES, plan, members, owned, counts, hops=hops, **given) for hops in (1, 2))
    slice_bytes = 4 * 256 * 1000
    assert one.values == pytest.approx(10.0 + 2 * slice_bytes / 7.5e3)
    assert two.values_across == pytest.approx(10.0 + slice_bytes / 7.5e3)
    assert two.values_inside == pytest.approx(2.0 + 2 * slice_bytes / 100e3)
    # Row indices and weights, to both members of the other node; a byte a token for counts.
    assert one.entries == pytest.approx(30.0 + 2 * (4000 * 8 + 1000) / 7.5e3)
    assert one.split_sizes == pytest.approx(10.0 + 2 * 8 / 7.5e3)
    assert one.score_grads == pytest.approx(10.0 + 2 * 4 * 4000 / 7.5e3)
    # Forward: sizes, rows, counts, weights, values; backward: gradients of outputs and scores.
    assert one.forward == pytest.approx(one.split_sizes + one.entries + one.values)
    assert one.backward == pytest.approx(one.output_grads + one.score_grads)


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("shards", [(4, 1), (1, 4), (2, 2), (2, 4), (4, 2)])
def test_even_exchange_is_that_of_even_counts(shards: tuple[int, int], hops: int) -> None:
    if hops == 2 and 1 in shards:
        return
    plan = plan_of(*shards, num_slots=64, value_dim=32, tile=4)
    members = range(plan.num_shards)
    owned = [[300 * 8 // shards[0]] * shards[0] for _ in members]
    for recomputed, products in ((False, False), (True, False), (True, True)):
        ways = {"reads": 8, "value_bytes": 2, "hops": hops, "recomputed": recomputed, "products": products}
        exact = exchange_us(TWO_NODES, plan, members, owned, [300] * plan.num_shards, **ways)
        assert asdict(even_exchange_us(TWO_NODES, plan, members, 300, **ways)) == pytest.approx(asdict(exact))


def test_merging_saves_entries_and_adds_counts() -> None:
    plan = plan_of(1, 2, num_slots=64, value_dim=32, tile=4)
    given = {"reads": 8, "value_bytes": 4}
    plain, merged, shared = (
        even_exchange_us(TWO_NODES, plan, [0, 2], 1000, **given, **ways)
        for ways in ({}, {"merged": True}, {"merged": True, "duplicate_share": 0.25})
    )
    assert plain.split_sizes == 0.0 < merged.split_sizes
    assert merged.entries == pytest.approx(plain.entries + 10.0 + 1000 / 7.5e3)
    assert merged.entries - shared.entries == pytest.approx(0.25 * 8000 * 8 / 7.5e3)
    assert plain.score_grads - shared.score_grads == pytest.approx(0.25 * 8000 * 4 / 7.5e3)


def test_thousands_of_members_are_priced_at_once() -> None:
    plan = plan_of(64, 64, num_slots=1024**2, value_dim=4096, tile=1)
    start = time.perf_counter()
    times = even_exchange_us(TWO_NODES, plan, range(4096), 4096.0, reads=128, value_bytes=2, hops=2)
    assert times.total > 0.0
    assert time.perf_counter() - start < 2.0
