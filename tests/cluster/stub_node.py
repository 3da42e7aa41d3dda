"""A node's agent without a run, for what SLURM and the batch script do: `SlurmJob(agent="stub_node")`.

The nodes meet at the rendezvous over TCP. Then each does what `act.json` in the run's directory says for the attempt:

    finish          leaves with 0
    fail            the second node leaves with 3, the first stays; at SIGTERM it leaves with 0
    refuse          leaves with 2, as for bad input
    go on           stays; at SIGTERM the first node saves a checkpoint, and all leave with 0
    cannot save     stays; at SIGTERM leaves with 5
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

SAVE_SECONDS = 1.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--patience", type=float, required=True)
    given = parser.parse_args()
    rank, node = int(os.environ["SLURM_NODEID"]), os.environ["SLURMD_NODENAME"]
    told: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.time()))
    restart = int(given.attempt.partition("-")[2])
    act = json.loads((given.run_dir / "act.json").read_text())[restart]
    meet(given.rendezvous, rank, given.nodes)
    seen = {"node": node, "pid": os.getpid(), "host": given.rendezvous.partition(":")[0], "nproc": given.nproc}
    aside = given.run_dir / f"aside-{rank}"
    aside.write_text(json.dumps({**seen, "given": os.environ.get("GIVEN", "")}))
    aside.rename(given.run_dir / f"seen-{restart}-{rank}")
    print(f"{node} does: {act}", flush=True)
    if act == "refuse":
        return 2
    if act == "fail" and rank == 1:
        return 3
    while act != "finish" and not told:
        time.sleep(0.05)
    print(f"{node} was told to end: {bool(told)}", flush=True)
    if act == "cannot save":
        return 5
    if act == "go on":
        time.sleep(SAVE_SECONDS)
        if rank == 0:
            (given.run_dir / "checkpoints" / f"step_{restart:08d}").mkdir(parents=True)
    return 0


def meet(rendezvous: str, rank: int, num_nodes: int) -> None:
    """Wait until all nodes have come to the first one's address."""
    host, _, port = rendezvous.rpartition(":")
    if rank == 0:
        with socket.create_server((host, int(port))) as server:
            others = [server.accept()[0] for _ in range(num_nodes - 1)]
            for other in others:
                other.sendall(b"!")
                other.close()
        return
    until = time.monotonic() + 30.0
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=30.0) as first:
                assert first.recv(1) == b"!"
                return
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
