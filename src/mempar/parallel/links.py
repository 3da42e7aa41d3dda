"""The links between ranks, as far as the time of a message depends on them.

Two kinds: those inside a node, and those across nodes. A message of B bytes takes `latency + B / bandwidth` (Hockney,
"The communication challenge for MPP", 1994). Links carry as much in both directions at once. A node's way out is
shared: what its ranks send to other nodes together is bounded by `node_gb_per_s`, and so is what they receive.
"""

import math
from dataclasses import dataclass

from mempar.errors import ConfigError

# A byte at one GB/s takes a nanosecond.
_BYTES_PER_US_AT_ONE_GB_PER_S = 1000.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends over, in one direction, while as much comes in.

    Attributes:
        latency_us: of a message of no bytes, from the call to its end at the receiver.
        gb_per_s: 10^9 bytes a second; `math.inf` for a link that costs nothing.
    """

    latency_us: float
    gb_per_s: float

    def __post_init__(self) -> None:
        """Refuse figures that no link has.

        Raises:
            ConfigError: when a figure is no number, negative, or an infinite latency.
        """
        if not 0.0 <= self.latency_us < math.inf:
            raise ConfigError(
                f"a link's latency_us={self.latency_us}: a latency is a finite number of microseconds, 0 or more; "
                "correct the hardware's description."
            )
        _check_bandwidth("a link's gb_per_s", self.gb_per_s)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes of equally many ranks, world ranks counted node by node.

    Attributes:
        inside: of a rank to the other ranks of its node.
        across: of a rank to ranks of other nodes, while the rest of its node is silent.
        ranks_per_node: ranks of a node.
        node_gb_per_s: what all ranks of a node send out of it together, and receive.
    """

    inside: Link
    across: Link
    ranks_per_node: int
    node_gb_per_s: float

    def __post_init__(self) -> None:
        """Refuse nodes without ranks, and figures that no node has.

        Raises:
            ConfigError: when a figure is out of range.
        """
        if self.ranks_per_node < 1:
            raise ConfigError(
                f"ranks_per_node={self.ranks_per_node}: a node has one rank at least; correct the hardware's "
                "description."
            )
        _check_bandwidth("node_gb_per_s", self.node_gb_per_s)

    def node_of(self, rank: int) -> int:
        """Node of a world rank."""
        return rank // self.ranks_per_node

    @property
    def across_gb_per_s(self) -> float:
        """What a rank sends to other nodes while all ranks of its node do the same."""
        return min(self.across.gb_per_s, self.node_gb_per_s / self.ranks_per_node)


def bytes_per_us(gb_per_s: float) -> float:
    """Bytes that go through in a microsecond."""
    return gb_per_s * _BYTES_PER_US_AT_ONE_GB_PER_S


def transfer_us(num_bytes: float, gb_per_s: float) -> float:
    """Microseconds that bytes take at a bandwidth, without latency."""
    return num_bytes / bytes_per_us(gb_per_s)


def _check_bandwidth(name: str, gb_per_s: float) -> None:
    if not gb_per_s > 0.0:
        raise ConfigError(
            f"{name}={gb_per_s}: a bandwidth is a positive number of 10^9 bytes a second, or infinite; correct the "
            "hardware's description."
        )
