"""Times of collectives: what holds for any links and groups, and some by hand."""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempar.parallel.collective_time import (
    all_gather_us,
    all_reduce_us,
    all_to_all_us,
    all_to_alls_us,
    even_all_to_all_us,
    reduce_scatter_us,
    send_us,
)
from mempar.parallel.links import Link, Topology

bandwidths = st.one_of(st.floats(1e-3, 1e4), st.just(math.inf))
links = st.builds(Link, latency_us=st.floats(0.0, 1e4), gb_per_s=bandwidths)
topologies = st.builds(Topology, inside=links, across=links, ranks_per_node=st.integers(1, 5), node_gb_per_s=bandwidths)
groups = st.lists(st.integers(0, 19), min_size=1, max_size=7, unique=True)
sizes = st.integers(0, 10**9)
FREE = Link(latency_us=0.0, gb_per_s=math.inf)
# Two nodes of four: a microsecond inside, ten across.
TWO_NODES = Topology(
    inside=Link(latency_us=1.0, gb_per_s=100.0),
    across=Link(latency_us=10.0, gb_per_s=10.0),
    ranks_per_node=4,
    node_gb_per_s=20.0,
)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    members = draw(groups)
    row = st.lists(sizes, min_size=len(members), max_size=len(members))
    return members, draw(st.lists(row, min_size=len(members), max_size=len(members)))


def every_time(topology: Topology, members: list[int], sent_bytes: list[list[int]], num_bytes: int) -> dict[str, float]:
    return {
        "all_to_all": all_to_all_us(topology, members, sent_bytes),
        "even_all_to_all": even_all_to_all_us(topology, members, num_bytes),
        "all_reduce": all_reduce_us(topology, members, num_bytes),
        "all_gather": all_gather_us(topology, members, num_bytes),
        "reduce_scatter": reduce_scatter_us(topology, members, num_bytes),
        "send": send_us(topology, members[0], members[-1], num_bytes),
    }


@given(traffic(), sizes, st.integers(1, 5))
def test_links_that_cost_nothing_take_no_time(
    group: tuple[list[int], list[list[int]]], num_bytes: int, ranks_per_node: int
) -> None:
    free = Topology(inside=FREE, across=FREE, ranks_per_node=ranks_per_node, node_gb_per_s=math.inf)
    assert set(every_time(free, *group, num_bytes).values()) == {0.0}


@given(topologies, traffic(), sizes, st.sampled_from(["inside", "across", "node"]), st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(
    topology: Topology, group: tuple[list[int], list[list[int]]], num_bytes: int, which: str, factor: float
) -> None:
    if which == "node":
        better = dataclasses.replace(topology, node_gb_per_s=topology.node_gb_per_s * factor)
    else:
        link = getattr(topology, which)
        better = dataclasses.replace(topology, **{which: dataclasses.replace(link, gb_per_s=link.gb_per_s * factor)})
    before, after = (every_time(given, *group, num_bytes) for given in (topology, better))
    assert all(after[name] <= before[name] for name in before)


@given(topologies, traffic(), sizes)
def test_more_bytes_are_never_faster_and_one_member_takes_no_time(
    topology: Topology, group: tuple[list[int], list[list[int]]], num_bytes: int
) -> None:
    members, sent_bytes = group
    before = every_time(topology, members, sent_bytes, num_bytes)
    after = every_time(topology, members, [[size + 1 for size in row] for row in sent_bytes], num_bytes + 1)
    assert all(0.0 <= before[name] <= after[name] for name in before)
    assert set(every_time(topology, members[:1], [[num_bytes]], num_bytes).values()) == {0.0}


@given(topologies, groups, sizes)
def test_even_all_to_all_is_that_of_equal_parts(topology: Topology, members: list[int], bytes_per_pair: int) -> None:
    parts = [[bytes_per_pair] * len(members) for _ in members]
    expected = all_to_all_us(topology, members, parts)
    assert even_all_to_all_us(topology, members, bytes_per_pair) == pytest.approx(expected, rel=1e-12)


@given(topologies, traffic())
def test_all_to_all_does_not_depend_on_the_order_of_members(
    topology: Topology, group: tuple[list[int], list[list[int]]]
) -> None:
    members, sent_bytes = group
    turned = [row[1:] + row[:1] for row in sent_bytes[1:] + sent_bytes[:1]]
    expected = pytest.approx(all_to_all_us(topology, members, sent_bytes), rel=1e-12)
    assert all_to_all_us(topology, members[1:] + members[:1], turned) == expected


def test_many_all_to_alls_are_priced_like_one() -> None:
    draw = np.random.default_rng(3)
    members = [7, 0, 1, 4, 2]
    sent_bytes = draw.integers(0, 10**6, (3, 2, 5, 5)) * draw.integers(0, 2, (3, 2, 5, 5))
    times = all_to_alls_us(TWO_NODES, members, sent_bytes)
    assert times.shape == (3, 2)
    assert times.tolist() == [
        [all_to_all_us(TWO_NODES, members, parts.tolist()) for parts in row] for row in sent_bytes
    ]
    assert all_to_alls_us(TWO_NODES, members, 0 * sent_bytes).tolist() == [[0.0] * 2] * 3


def test_busiest_link_bounds_an_all_to_all() -> None:
    # Rank 0 sends 3 MB to a neighbour; what crosses shares 5 GB/s a rank, of the node's 20 among four.
    members = [0, 1, 4, 5]
    quiet = [[0] * 4 for _ in members]
    inside = [[0, 3_000_000, 0, 0], *quiet[1:]]
    assert all_to_all_us(TWO_NODES, members, inside) == pytest.approx(1.0 + 30.0)
    # One of the two sends: its own link of 10 GB/s bounds, and the node's share of two members, 10 GB/s.
    across = [[0, 0, 1_000_000, 0], *quiet[1:]]
    assert all_to_all_us(TWO_NODES, members, across) == pytest.approx(10.0 + 100.0)
    # Both send, to one receiver; then to one each, where the node alone bounds.
    assert all_to_all_us(TWO_NODES, members, [*[[0, 0, 1_000_000, 0]] * 2, *quiet[2:]]) == pytest.approx(10.0 + 200.0)
    both = [[0, 0, 1_000_000, 0], [0, 0, 0, 1_000_000], *quiet[2:]]
    assert all_to_all_us(TWO_NODES, members, both) == pytest.approx(10.0 + 200.0)
    # Inside and across overlap.
    assert all_to_all_us(TWO_NODES, members, [[0, 3_000_000, 1_000_000, 0], *quiet[1:]]) == pytest.approx(110.0)


def test_members_are_spread_over_nodes_in_any_way() -> None:
    # Three on one node and one on the other: the lone one takes what three send, at the 5 GB/s that it gets of the way.
    assert even_all_to_all_us(TWO_NODES, [0, 1, 2, 7], 1_000_000) == pytest.approx(10.0 + 3 * 200.0)
    assert even_all_to_all_us(TWO_NODES, [2, 7, 0, 1], 1_000_000) == pytest.approx(10.0 + 3 * 200.0)


def test_rings_pass_every_part_but_one() -> None:
    inside = [0, 1, 2, 3]
    assert all_gather_us(TWO_NODES, inside, 4_000_000) == pytest.approx(3 * 1.0 + 30.0)
    assert reduce_scatter_us(TWO_NODES, inside, 4_000_000) == pytest.approx(3 * 1.0 + 30.0)
    assert all_reduce_us(TWO_NODES, inside, 4_000_000) == pytest.approx(2 * (3 * 1.0 + 30.0))
    # Over two nodes: six steps inside and one across; four links of 5 GB/s leave a node.
    everywhere = list(range(8))
    assert all_gather_us(TWO_NODES, everywhere, 8_000_000) == pytest.approx(6 * 1.0 + 10.0 + 350.0)
    # One link of 5 GB/s where the node has one member.
    assert all_gather_us(TWO_NODES, [0, 4], 8_000_000) == pytest.approx(10.0 + 800.0)


def test_small_messages_between_many_nodes_take_a_tree_and_large_ones_a_ring() -> None:
    # Three steps inside and ten across, there and back.
    small = all_reduce_us(TWO_NODES, range(4 * 1024), 1000)
    assert small == pytest.approx(2 * (3 * 1.0 + 10 * 10.0 + 1000 / 20e3))
    large = all_reduce_us(TWO_NODES, range(16), 10**9)
    assert large == pytest.approx(2 * ((16 - 4) * 1.0 + 3 * 10.0 + 10**9 * 15 / 16 / 20e3))


def test_a_message_takes_latency_and_bandwidth_of_its_link() -> None:
    assert send_us(TWO_NODES, 0, 3, 1_000_000) == pytest.approx(1.0 + 10.0)
    assert send_us(TWO_NODES, 0, 4, 1_000_000) == pytest.approx(10.0 + 200.0)
    alone = dataclasses.replace(TWO_NODES, node_gb_per_s=math.inf)
    assert send_us(alone, 0, 4, 1_000_000) == pytest.approx(10.0 + 100.0)


@pytest.mark.parametrize("collective", [even_all_to_all_us, all_reduce_us, all_gather_us])
def test_thousands_of_members_are_priced_at_once(collective: Callable[..., float]) -> None:
    ranks = list(range(4096))
    start = time.perf_counter()
    for _ in range(10):
        assert collective(TWO_NODES, ranks, 1000) > 0.0
    # A millisecond or two each here; a form that looks at pairs takes seconds.
    assert time.perf_counter() - start < 2.0
