"""What the links between the ranks at hand can do, measured: latency and bandwidth from messages of given sizes.

Pairs of ranks exchange messages in both directions at once, over and over, so that one exchange starts both ends of the
next. Before any is timed comes one as long that is not, after which a connection sends as fast as it can; then all
pairs begin at once, so that the time of the last one holds the bytes of all that share its link. What else a machine
and its links do only adds to a time, so the fastest of some rows counts.

Bandwidth is what a long message takes more than one half as long, latency what a short one takes. (Not the line through
the short and the long one: pairs that share a link hide their latencies behind each other's long messages.) But no
link is taken to carry a long message faster than it did: with a latency before it, its bytes had the rest of its time.

Three sets of pairs: neighbours inside every node, one pair across two nodes, and all ranks of two nodes across.
"""

import socket
import time

import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.parallel.links import Link, Topology, bytes_per_us

SHORT_BYTES = 1024
# A long message takes a twentieth of a second, if one can be so long, and many times as long as a short one.
_LONG_US, _LONG_TIMES = 5e4, 10.0
_FIRST_BYTES, _MOST_BYTES = 1 << 17, 1 << 28
# Exchanges in a row, of long messages and of short ones.
_LONG_ROW, _SHORT_ROW = 4, 16
_NUM_ROWS = 5


def measure_topology(device: torch.device) -> Topology:
    """Measure the links of the world; every rank must call it, and all learn the same.

    Takes some seconds. On one node `across` is `inside`, and a node's way out is not bounded; a rank alone on its
    node has `across` inside.

    Args:
        device: where messages lie: that of the process group's backend.

    Raises:
        ConfigError: on every rank, when nodes have not equally many ranks, or their ranks do not follow each other.
    """
    rank, hosts = dist.get_rank(), _hosts()
    size = hosts.count(hosts[0])
    if hosts != [hosts[node * size] for node in range(len(hosts) // size) for _ in range(size)]:
        raise ConfigError(
            f"ranks lie on nodes {', '.join(hosts)}; links are measured between nodes of equally many ranks that "
            "follow each other; start as many ranks on every node, one node after the other."
        )
    node, place = divmod(rank, size)
    inside = across = None
    if size > 1:
        neighbour = rank + 1 - 2 * (place % 2)
        inside = _measure(neighbour if neighbour // size == node else None, device)
    node_gb_per_s = float("inf")
    if len(hosts) > size:
        opposite = (1 - node) * size + place if node < 2 else None
        across = _measure(opposite if place == 0 else None, device)
        together = across if size == 1 else _measure(opposite, device)
        node_gb_per_s = size * together.gb_per_s
    known = inside or across
    if known is None:
        raise ConfigError(f"{len(hosts)} rank has no link to measure; start two ranks or more.")
    return Topology(inside=inside or known, across=across or known, ranks_per_node=size, node_gb_per_s=node_gb_per_s)


def link_through(short_us: float, half_us: float, long_bytes: int, long_us: float) -> Link:
    """The link on which messages of `SHORT_BYTES`, of half of `long_bytes` and of all take these times."""
    least_us_per_byte = (long_us - short_us) / long_bytes
    us_per_byte = max((long_us - half_us) / (long_bytes / 2), least_us_per_byte)
    if us_per_byte <= 0.0:
        # Noise alone: the most that can be said for the link is that it carried the bytes.
        us_per_byte = long_us / long_bytes
    gb_per_s = 1.0 / (us_per_byte * bytes_per_us(1.0))
    return Link(latency_us=max(0.0, short_us - us_per_byte * SHORT_BYTES), gb_per_s=gb_per_s)


def _hosts() -> list[str]:
    """Name of every rank's host."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def _measure(peer: int | None, device: torch.device) -> Link:
    """The link of all pairs that exchange at once, as the slowest sees it; ranks without a peer look on."""
    short_us = _exchange_us(peer, SHORT_BYTES, _SHORT_ROW, device)
    num_bytes, enough_us = 2 * _FIRST_BYTES, max(_LONG_US, _LONG_TIMES * short_us)
    while num_bytes < _MOST_BYTES and _exchange_us(peer, num_bytes, 1, device, num_rows=2) < enough_us:
        num_bytes *= 2
    half_us, long_us = (_exchange_us(peer, size, _LONG_ROW, device) for size in (num_bytes // 2, num_bytes))
    return link_through(short_us, half_us, num_bytes, long_us)


def _exchange_us(
    peer: int | None, num_bytes: int, in_a_row: int, device: torch.device, num_rows: int = _NUM_ROWS
) -> float:
    """Time of a message to the peer and one from it at once: the fastest row, until the last pair has ended it."""
    row_us = torch.zeros(num_rows, dtype=torch.float64, device=device)
    send, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        if peer is not None:
            # gloo says that a receive waits on the connection that carries the data: behind them, if it is posted last.
            ends = [dist.P2POp(dist.irecv, received, peer), dist.P2POp(dist.isend, send, peer)]
            for work in dist.batch_isend_irecv(ends):
                work.wait()

    for row in range(num_rows):
        # To warm the connection.
        exchange()
        # Nobody begins before all are there.
        dist.all_reduce(torch.zeros(1, device=device))
        start = _now(device)
        for _ in range(in_a_row):
            exchange()
        row_us[row] = (_now(device) - start) / in_a_row
    dist.all_reduce(row_us, op=dist.ReduceOp.MAX)
    # The first row opens connections.
    return min(row_us.tolist()[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e6
