"""A node's part in a launch, and how the nodes of one find each other.

Torchrun's agents wait for each other in native code, where signals are not heard. So nodes gather here first: the head
node opens the store that torchrun's agents, and then the ranks, will use, every node leaves its name there, and all
look until the last one has come. torch is imported only for that.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from mempar.errors import ConfigError, MemparError

_POLL_SECONDS = 0.2
_PART_SECONDS = 0.02
# For the store of a launch that has just ended to leave its port.
_PORT_PATIENCE_SECONDS = 5.0
_STORE_SECONDS = 10
# For the end of another node to be seen here.
_NEWS_SECONDS = 3.0
# What the head keeps the store for others, whose agents have just met in it for the last time.
_FAREWELL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node's part in a launch.

    Attributes:
        name: as the launcher knows it; several nodes may lie on one host.
        num_ranks: processes on this node; equal on all nodes.
        node_rank: its number; node 0 is the head.
        num_nodes: how many nodes there are.
        rendezvous: HOST:PORT of the head, as all nodes reach it; empty for a single node.
        attempt: names this start of the run among others; empty for a single node.
    """

    name: str
    num_ranks: int
    node_rank: int = 0
    num_nodes: int = 1
    rendezvous: str = ""
    attempt: str = ""

    @property
    def first_rank(self) -> int:
        """The number of this node's first rank in the world."""
        return self.node_rank * self.num_ranks

    @property
    def is_head(self) -> bool:
        """Whether this node holds the run's lock and speaks for all."""
        return self.node_rank == 0


def this_host(num_ranks: int) -> Node:
    """The only node of a launch."""
    return Node(name=socket.gethostname(), num_ranks=num_ranks)


def gather(node: Node, seconds: float, given_up: Callable[[], bool]) -> Any:
    """Wait until all nodes of a launch have come; every node must call it.

    Args:
        node: this one; there are several.
        seconds: to wait.
        given_up: looked at in between.

    Returns:
        The store, which lives as long as this is kept; None when it was given up.

    Raises:
        ConfigError: when the head's port is in use.
        MemparError: when the head is not reached, or a node does not come.
    """
    host, port = endpoint(node.rendezvous)
    until = time.monotonic() + seconds
    if node.is_head:
        _wait_for_port(port, given_up)
    while not node.is_head and not given_up() and not _listens(host, port):
        if time.monotonic() > until:
            raise MemparError(
                f"node {node.name} did not reach the head node at {node.rendezvous} in {seconds:g} s; all nodes meet "
                "there; see that the name resolves on every node, that no firewall closes the port (--port), and that "
                "the head was started."
            )
        time.sleep(_POLL_SECONDS)
    if given_up():
        return None
    return _meet(node, host, port, until, given_up)


def part(node: Node, store: Any) -> None:
    """Leave the store when all nodes' ranks have ended well; every node must call it.

    The head's process is the store's server: an agent still reading that all are done would lose it, and say so.

    Args:
        node: this one; there are several.
        store: in which they have gathered.
    """
    others = [f"{node.attempt}/parted/{rank}" for rank in range(1, node.num_nodes)]
    until = time.monotonic() + _FAREWELL_SECONDS
    # Nobody is waited for who is gone already, or who cannot say so any more.
    with suppress(RuntimeError):
        if not node.is_head:
            store.set(others[node.node_rank - 1], "")
        while node.is_head and not store.check(others) and time.monotonic() < until:
            time.sleep(_PART_SECONDS)


def endpoint(rendezvous: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ConfigError: when it is not of that form.
    """
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{rendezvous}' is no meeting place of nodes; it is HOST:PORT; correct it.")
    return host.strip("[]"), int(port)


def meeting_interface(node: Node, store: Any) -> str:
    """The network interface over which this node and the others reach each other; empty where that cannot be told.

    On the head its own name often stands for a loopback address (Debian writes 127.0.1.1 into /etc/hosts), so that it
    goes by the address at which node 1 has reached it.

    Args:
        node: this one; there are several.
        store: in which they have gathered.
    """
    return _interface_of(store.get(_head_key(node)).decode()) if node.is_head else reaching_interface(node.rendezvous)


def reaching_interface(rendezvous: str) -> str:
    """The network interface over which the head node is reached; empty where that cannot be told."""
    host, port = endpoint(rendezvous)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it asks the routing table.
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return ""
    return _interface_of(own)


def _interface_of(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return name
    return ""


def _head_key(node: Node) -> str:
    return f"{node.attempt}/head"


def _address_of(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=2.0) as probe:
            # Of IPv6, without the zone, which is this node's own.
            return probe.getpeername()[0].partition("%")[0]
    except OSError:
        return ""


def _wait_for_port(port: int, given_up: Callable[[], bool]) -> None:
    until = time.monotonic() + _PORT_PATIENCE_SECONDS
    while not given_up():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise ConfigError(
                        f"port {port} cannot be used on the head node {socket.gethostname()} ({error.strerror}); nodes "
                        "meet there, and nothing else may listen; give another one with --port."
                    ) from None
        time.sleep(_POLL_SECONDS)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def _meet(node: Node, host: str, port: int, until: float, given_up: Callable[[], bool]) -> Any:
    import datetime

    from torch.distributed import TCPStore

    keys = [f"{node.attempt}/node/{rank}" for rank in range(node.num_nodes)]
    # Of native code, which hears no signals; the head listens already, and answers at once.
    patience = datetime.timedelta(seconds=_STORE_SECONDS)
    try:
        store = TCPStore(host, port, None, node.is_head, patience, wait_for_workers=False, multi_tenant=True)
        if node.node_rank == 1:
            store.set(_head_key(node), _address_of(host, port))
        store.set(keys[node.node_rank], node.name)
        while not store.check(keys):
            if given_up():
                return None
            if time.monotonic() > until:
                missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                raise MemparError(
                    f"node(s) {', '.join(missing)} of {node.num_nodes} did not come to {node.rendezvous} in time; a "
                    "run needs all of its nodes; see what they say, and that they reach that address."
                )
            time.sleep(_POLL_SECONDS)
    except RuntimeError as error:
        if comes_true(given_up):
            return None
        raise MemparError(
            f"node {node.name} lost the head node at {node.rendezvous} while nodes gathered ({_first_line(error)}); "
            "all nodes meet there; see what the head says."
        ) from None
    return store


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether something comes to be known within the moment that news of other nodes take."""
    until = time.monotonic() + _NEWS_SECONDS
    while not condition() and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return condition()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
