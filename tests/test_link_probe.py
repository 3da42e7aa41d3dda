"""Measuring links: between ranks of this machine, which may pretend to be several."""

import math
import socket

import pytest
import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.parallel import link_probe
from mempar.parallel.link_probe import SHORT_BYTES, link_through, measure_topology
from mempar.parallel.links import Topology
from rank_pool import RankPool


def measure(hosts: str) -> Topology | str:
    """Measure links with messages of a few kB; rank r is on the host that the r-th letter names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: hosts[dist.get_rank()])
        patch.setattr(link_probe, "_MOST_BYTES", 1 << 18)
        patch.setattr(link_probe, "_SHORT_ROW", 3)
        try:
            return measure_topology(torch.device("cpu"))
        except ConfigError as error:
            return str(error)


def test_link_is_the_one_that_messages_went_over() -> None:
    link = link_through(500.0 + SHORT_BYTES / 25.0, 500.0 + 5e6 / 25.0, 10**7, 500.0 + 10**7 / 25.0)
    assert link.latency_us == pytest.approx(500.0)
    assert link.gb_per_s == pytest.approx(0.025)
    # Pairs hid their latencies behind each other's long messages.
    assert link_through(500.0 + SHORT_BYTES / 25.0, 5e6 / 25.0, 10**7, 10**7 / 25.0) == link
    # A slow half makes no fast link: behind a latency of 10 us the long message had 88 us for its bytes.
    for half_us in (97.0, 99.0):
        assert link_through(10.0, half_us, 10**6, 98.0).gb_per_s == pytest.approx(10**6 / 88.0 / 1e3)
    # Noise alone gives a link too.
    assert link_through(99.0, 99.0, 10**6, 98.0).gb_per_s == pytest.approx(10**6 / 98.0 / 1e3)


@pytest.mark.parametrize("hosts", ["a", "aa", "ab", "aabb", "aaabbb"])
def test_every_rank_learns_the_same_topology(hosts: str, pool: RankPool) -> None:
    measured = pool.run(len(hosts), measure, hosts)
    assert all(one == measured[0] for one in measured)
    topology, per_node = measured[0], hosts.count("a")
    if hosts == "a":
        assert topology == "1 rank has no link to measure; start two ranks or more."
        return
    assert isinstance(topology, Topology)
    assert topology.ranks_per_node == per_node
    assert [topology.node_of(rank) for rank in range(len(hosts))] == [ord(host) - ord("a") for host in hosts]
    for link in (topology.inside, topology.across):
        assert 0.0 < link.gb_per_s < math.inf
    assert math.isinf(topology.node_gb_per_s) == (len(set(hosts)) == 1)
    if per_node == 1:
        assert topology.node_gb_per_s == topology.across.gb_per_s


def sizes_sent(num_bytes: int, in_a_row: int) -> list[int]:
    """Bytes of the messages that a rank sent in a first row."""
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = dist.batch_isend_irecv
        patch.setattr(dist, "batch_isend_irecv", lambda ends: sent.append(ends[1].tensor.numel()) or plain(ends))
        link_probe._exchange_us(1 - dist.get_rank(), num_bytes, in_a_row, torch.device("cpu"), num_rows=2)
    return sent[: len(sent) // 2]


def test_connections_are_warm_before_a_message_is_timed(pool: RankPool) -> None:
    assert pool.run(2, sizes_sent, 5000, 3) == [[5000] * 4] * 2


@pytest.mark.parametrize("hosts", ["aab", "aba", "abab"])
def test_nodes_that_are_not_alike_are_refused_by_every_rank(hosts: str, pool: RankPool) -> None:
    said = pool.run(len(hosts), measure, hosts)
    assert said == [said[0]] * len(hosts)
    assert said[0].startswith(f"ranks lie on nodes {', '.join(hosts)};")
