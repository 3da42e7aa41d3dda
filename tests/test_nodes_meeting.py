"""Nodes of a launch that find each other: where they meet, who comes, over which interface."""

import socket
import threading
import time

import psutil
import pytest

from free_port import free_port
from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch import nodes
from mempar.runtime.launch.nodes import Node, gather, reaching_interface


def test_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_PORT_PATIENCE_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = Node(name="a", num_ranks=1, num_nodes=2, rendezvous=f"127.0.0.1:{port}", attempt="x")
        with pytest.raises(ConfigError, match=rf"port {port} cannot be used .*--port"):
            gather(node, 5.0, lambda: False)


def test_head_that_is_not_there_is_named() -> None:
    node = Node(name="b", num_ranks=1, node_rank=1, num_nodes=2, rendezvous=f"127.0.0.1:{free_port()}", attempt="x")
    with pytest.raises(MemparError, match="node b did not reach the head node"):
        gather(node, 0.5, lambda: False)
    assert gather(node, 60.0, lambda: True) is None


def test_nodes_of_another_start_are_not_taken_for_these() -> None:
    port = free_port()

    def node(rank: int, attempt: str) -> Node:
        return Node(
            name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=f"127.0.0.1:{port}", attempt=attempt
        )

    met: list[object] = []
    head = threading.Thread(target=lambda: met.append(gather(node(0, "2"), 20.0, lambda: False)))
    head.start()
    with pytest.raises(MemparError, match=r"node\(s\) 0 of 2 did not come"):
        gather(node(1, "1"), 2.0, lambda: False)
    assert gather(node(1, "2"), 20.0, lambda: False) is not None
    head.join()
    assert met[0] is not None


def test_head_keeps_the_store_until_the_others_have_left_it() -> None:
    rendezvous = f"127.0.0.1:{free_port()}"
    ranks = [
        Node(name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=rendezvous, attempt="x")
        for rank in range(2)
    ]
    left: list[int] = []

    def head() -> None:
        store = gather(ranks[0], 20.0, lambda: False)
        nodes.part(ranks[0], store)
        left.append(0)

    thread = threading.Thread(target=head)
    thread.start()
    store = gather(ranks[1], 20.0, lambda: False)
    time.sleep(0.5)
    assert left == []
    nodes.part(ranks[1], store)
    thread.join(timeout=5.0)
    assert left == [0]


@pytest.mark.parametrize("wrong", ["", "host", "host:", "host:0", "host:70000", "host:x"])
def test_meeting_place_must_be_host_and_port(wrong: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        nodes.endpoint(wrong)


def test_interface_is_the_one_that_reaches_the_head() -> None:
    assert reaching_interface("127.0.0.1:1") == "lo"
    assert reaching_interface("no-such-host.invalid:1") == ""
    assert nodes.endpoint("[::1]:29500") == ("::1", 29500)


def test_head_goes_by_the_address_at_which_others_reach_it() -> None:
    """Its own name may stand for 127.0.1.1 there, as Debian has it: gloo would tell others to connect to themselves."""
    addresses = {
        known.address: name
        for name, found in psutil.net_if_addrs().items()
        for known in found
        if known.family == socket.AF_INET
    }
    for own, seen in [("localhost", address) for address in addresses]:
        port = free_port()
        head, other = (
            Node(name=str(rank), num_ranks=1, node_rank=rank, num_nodes=2, rendezvous=f"{host}:{port}", attempt="x")
            for rank, host in enumerate((own, seen))
        )
        met: list[object] = []
        thread = threading.Thread(target=lambda met=met, node=head: met.append(gather(node, 20.0, lambda: False)))
        thread.start()
        store = gather(other, 20.0, lambda: False)
        thread.join()
        assert nodes.meeting_interface(head, met[0]) == nodes.meeting_interface(other, store) == addresses[seen]


def test_ranks_are_numbered_node_by_node() -> None:
    node = Node(name="c", num_ranks=8, node_rank=3, num_nodes=4)
    assert (node.first_rank, node.is_head) == (24, False)
