"""Time of collectives on given links, in closed form: microseconds from the moment the last member calls.

What is assumed of the libraries:
  all-to-all      every member posts all its sends and receives at once, as NCCL's grouped sends and gloo's alltoallv
                  do: one latency, and the busiest link bounds (a rank's in and out, a node's in and out). Messages
                  inside and across nodes use different links and overlap.
  all-reduce      a ring in which each link carries `2 (n - 1) / n` of the bytes (Patarasuk and Yuan, "Bandwidth
                  optimal all-reduce algorithms", 2009), or where that is faster, for small messages between many
                  nodes, a double binary tree that carries them twice (Sanders, Speck and Träff, "Two-tree algorithms",
                  2009): what NCCL chooses from.
  all-gather, reduce-scatter      the ring, each link carrying `(n - 1) / n` of the bytes.
Over N nodes a ring of n members takes `n - N` steps inside nodes and `N - 1` across for each round, and a node's
members cross on as many links as they are: the slowest link bounds the bandwidth, latencies add up. NCCL's own choice
of algorithms counts steps so (src/graph/tuning.cc).

Ranks of a node that are no members are taken to do the same in groups of their own, at the same time: ranks all run the
same program. To price a group that has its node's way out for itself, give a topology with `node_gb_per_s=math.inf`.

What it does not know: switches between nodes that are slower than the nodes, the host's work, stragglers. Nor that gloo
uses the two directions of a connection one after the other when a member calls later than the other by more than a
message's way: it posts its sends first, and says that it receives behind their bytes. Between two members an all-to-all
then takes twice as long.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mempar.parallel.links import Topology, bytes_per_us, transfer_us


def all_to_all_us(topology: Topology, members: Sequence[int], sent_bytes: Sequence[Sequence[int]]) -> float:
    """An all-to-all of parts of any sizes.

    Args:
        topology: the links.
        members: world ranks, spread over nodes in any way.
        sent_bytes: `sent_bytes[p][q]`, bytes from member p to member q; what a member keeps is not looked at, and
            a pair without bytes costs nothing.
    """
    return float(all_to_alls_us(topology, members, np.array(sent_bytes, dtype=np.float64)))


def all_to_alls_us(topology: Topology, members: Sequence[int], sent_bytes: np.ndarray) -> np.ndarray:
    """Many all-to-alls over groups that are placed alike.

    Args:
        topology: the links.
        members: world ranks of one of the groups.
        sent_bytes: `[..., P, P]`, each as in `all_to_all_us`.

    Returns:
        `[...]` microseconds.
    """
    nodes, home, present = np.unique(
        [topology.node_of(rank) for rank in members], return_inverse=True, return_counts=True
    )
    at_home = home[:, None] == home
    within = sent_bytes * (at_home & ~np.eye(len(members), dtype=bool))
    leaving = sent_bytes * ~at_home
    busiest_inside = np.maximum(within.sum(-1), within.sum(-2)).max(-1)
    out, coming = leaving.sum(-1), leaving.sum(-2)
    busiest_across = np.maximum(out, coming).max(-1)
    # The node's other ranks send as much as its members do on average.
    mean = (np.arange(len(nodes)) == home[:, None]) / present
    busiest_node = np.maximum(out @ mean, coming @ mean).max(-1)
    inside_us = topology.inside.latency_us + busiest_inside / bytes_per_us(topology.inside.gb_per_s)
    node_us = busiest_node / bytes_per_us(topology.node_gb_per_s / topology.ranks_per_node)
    rank_us = busiest_across / bytes_per_us(topology.across.gb_per_s)
    across_us = topology.across.latency_us + np.maximum(rank_us, node_us)
    return np.maximum(inside_us * (busiest_inside > 0), across_us * (busiest_across > 0))


def even_all_to_all_us(topology: Topology, members: Sequence[int], bytes_per_pair: float) -> float:
    """An all-to-all in which every member sends as much to every other one.

    The same as `all_to_all_us`, in a time that grows with the number of members and not of pairs.
    """
    present = _members_by_node(topology, members)
    inside = across = 0.0
    if bytes_per_pair and (most := max(present)) > 1:
        inside = topology.inside.latency_us + transfer_us(bytes_per_pair * (most - 1), topology.inside.gb_per_s)
    if bytes_per_pair and len(present) > 1:
        sent = bytes_per_pair * (len(members) - min(present))
        across = topology.across.latency_us + transfer_us(sent, topology.across_gb_per_s)
    return max(inside, across)


def all_reduce_us(topology: Topology, members: Sequence[int], num_bytes: float) -> float:
    """An all-reduce of `num_bytes` on every member, by a ring or a double binary tree, whichever is faster."""
    present = _members_by_node(topology, members)
    if len(members) == 1 or not num_bytes:
        return 0.0
    ring = 2.0 * _ring_us(topology, present, num_bytes)
    steps_inside, steps_across = max(present) - 1, math.ceil(math.log2(len(present)))
    latency = steps_inside * topology.inside.latency_us + steps_across * topology.across.latency_us
    tree = 2.0 * (latency + transfer_us(num_bytes, _slowest_gb_per_s(topology, present)))
    return min(ring, tree)


def all_gather_us(topology: Topology, members: Sequence[int], num_bytes: float) -> float:
    """A ring all-gather after which every member has `num_bytes`, its own part included."""
    present = _members_by_node(topology, members)
    return 0.0 if len(members) == 1 or not num_bytes else _ring_us(topology, present, num_bytes)


def reduce_scatter_us(topology: Topology, members: Sequence[int], num_bytes: float) -> float:
    """A ring reduce-scatter of `num_bytes` on every member: an all-gather run backwards."""
    return all_gather_us(topology, members, num_bytes)


def send_us(topology: Topology, source: int, target: int, num_bytes: float) -> float:
    """A message from one rank to another; the source's node sends as much from each of its ranks."""
    if source == target:
        return 0.0
    if topology.node_of(source) == topology.node_of(target):
        return topology.inside.latency_us + transfer_us(num_bytes, topology.inside.gb_per_s)
    return topology.across.latency_us + transfer_us(num_bytes, topology.across_gb_per_s)


def _ring_us(topology: Topology, present: list[int], num_bytes: float) -> float:
    """One round of a ring: each of n members passes on all parts but one, `num_bytes / n` each."""
    size, num_nodes = sum(present), len(present)
    latency = (size - num_nodes) * topology.inside.latency_us + (num_nodes - 1) * topology.across.latency_us
    return latency + transfer_us(num_bytes * (size - 1) / size, _slowest_gb_per_s(topology, present))


def _slowest_gb_per_s(topology: Topology, present: list[int]) -> float:
    """Bandwidth of the slowest link of rings through all members, of which each member of a node starts one."""
    inside = topology.inside.gb_per_s if max(present) > 1 else math.inf
    across = topology.across_gb_per_s * min(present) if len(present) > 1 else math.inf
    return min(inside, across)


def _members_by_node(topology: Topology, members: Sequence[int]) -> list[int]:
    """How many members each node has that has any."""
    return list(Counter(map(topology.node_of, members)).values())
