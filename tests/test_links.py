"""What links and topologies accept, and which node a rank is on."""

import math

import pytest

from mempar.errors import ConfigError
from mempar.parallel.links import Link, Topology, transfer_us

FAST = Link(latency_us=0.0, gb_per_s=math.inf)


def topology_of(**changes: float) -> Topology:
    return Topology(**{"inside": FAST, "across": FAST, "ranks_per_node": 4, "node_gb_per_s": 8.0, **changes})


def test_ranks_are_counted_node_by_node() -> None:
    assert [topology_of().node_of(rank) for rank in (0, 3, 4, 11)] == [0, 0, 1, 2]


def test_ranks_that_leave_a_node_together_share_its_way_out() -> None:
    assert topology_of().across_gb_per_s == 2.0
    assert topology_of(across=Link(latency_us=1.0, gb_per_s=1.5)).across_gb_per_s == 1.5
    assert topology_of(node_gb_per_s=math.inf).across_gb_per_s == math.inf


def test_a_byte_at_one_gb_per_s_takes_a_nanosecond() -> None:
    assert transfer_us(1, 1.0) == 1e-3
    assert transfer_us(10**12, math.inf) == 0.0


@pytest.mark.parametrize("latency_us", [-1.0, math.inf, math.nan])
def test_latencies_that_no_link_has_are_refused(latency_us: float) -> None:
    with pytest.raises(ConfigError, match=f"latency_us={latency_us}"):
        Link(latency_us=latency_us, gb_per_s=1.0)


@pytest.mark.parametrize("gb_per_s", [0.0, -1.0, math.nan])
def test_bandwidths_that_no_link_has_are_refused(gb_per_s: float) -> None:
    with pytest.raises(ConfigError, match=f"gb_per_s={gb_per_s}"):
        Link(latency_us=0.0, gb_per_s=gb_per_s)
    with pytest.raises(ConfigError, match=f"node_gb_per_s={gb_per_s}"):
        topology_of(node_gb_per_s=gb_per_s)


def test_nodes_without_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_node=0"):
        topology_of(ranks_per_node=0)
