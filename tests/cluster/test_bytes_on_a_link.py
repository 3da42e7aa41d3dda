"""What the ledger measures is what a link carries: the interface's own counter, for rows, columns and grids."""

import json
import os
import sys
from pathlib import Path

import pytest

from counted_exchange import LAYOUTS, RANKS_PER_HOST
from hosts import INTERFACE, Hosts

pytestmark = pytest.mark.cluster

PORT = 29517
# Headers of Ethernet, IP and TCP, acknowledgements of what came, gloo's announcements, the barriers around.
MOST_BESIDE = 0.06


def test_interface_counts_what_ranks_measured(hosts: Hosts, tmp_path: Path) -> None:
    program = Path(__file__).with_name("counted_exchange.py")
    size = RANKS_PER_HOST * len(hosts.names)
    pairs = [
        hosts.start(
            [sys.executable, str(program), str(tmp_path), INTERFACE],
            on=name,
            env={
                **os.environ,
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": hosts.addresses[hosts.names[0]],
                "MASTER_PORT": str(PORT),
                "WORLD_SIZE": str(size),
                "RANK": str(RANKS_PER_HOST * place),
            },
        )
        for place, name in enumerate(hosts.names)
    ]
    said = [pair.communicate(timeout=120)[0] for pair in pairs]
    assert [pair.returncode for pair in pairs] == [0] * len(pairs), said
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(size)]
    for name, (members, _, _) in LAYOUTS.items():
        for first in range(0, size, RANKS_PER_HOST):
            here = [found[rank][name] for rank in range(first, first + RANKS_PER_HOST)]
            measured, left = (sum(rank[what] for rank in here) for what in ("measured", "left"))
            # With one rank a host all that is measured leaves it; otherwise a part of it.
            assert (left == measured) if len(members) == len(hosts.names) else (measured / 3 < left < measured)
            share = here[0]["counter"] / left - 1
            print(f"{name}, host {first // RANKS_PER_HOST}: {left} bytes, counted {share:+.2%}")
            assert left > 2_000_000
            assert 0 <= share < MOST_BESIDE, (name, here)
