"""One node's agent of a launch: `python -m mempar.runtime.launch.node RUN_DIR ...`, started on every node.

Whoever starts it (ssh, srun), it is the same: it starts this node's ranks under torchrun's agent, watches them, heeds
SIGTERM, and ends them when another node's failed. The head's agent holds the run's lock and speaks for all: the
agents of other nodes say nothing that it can say.

Exit status: 0 when the run is done, or was told to end and has saved; 2 for bad input; 1 for any other failure.
"""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch.endings import RanksFailedError
from mempar.runtime.launch.local import run_node
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.node_ends import NodeEnd, record_node_end
from mempar.runtime.launch.nodes import Node, endpoint
from mempar.runtime.launch.parent import die_with
from mempar.runtime.launch.stopping import Terminated, ignore_signals, sigterm_raises
from mempar.runtime.launch.words import SILENCE_SECONDS, Listener, tell
from mempar.runtime.run_dir import RunDir

# An earlier start's ranks beyond a link that was down hold the run's lock until they miss their launcher; that of a
# node that died with it is kept by an NFS server for a lease: 90 seconds by default on Linux (nfsd(7), nfs4leasetime).
_LOCK_PATIENCE_SECONDS = max(SILENCE_SECONDS, 90.0) + 15.0


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    # Where a scheduler started this, it says which node this is.
    scheduled = os.environ
    parser = argparse.ArgumentParser(prog="mempar.runtime.launch.node")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--nproc", type=int, required=True, help="ranks on each node")
    parser.add_argument("--node-rank", type=int, default=int(scheduled.get("SLURM_NODEID", "0")))
    parser.add_argument("--node", default=scheduled.get("SLURMD_NODENAME", ""), help="name of this node")
    parser.add_argument("--rendezvous", default="", help="HOST:PORT of the head node")
    parser.add_argument("--attempt", default="", help="names this start of the run")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for other nodes")
    parser.add_argument("--stdin", action="store_true", help="live on the words of a launcher")
    parser.add_argument("--launcher", type=int, default=0, help="process on this machine to die with")
    parser.add_argument("--worker", default="mempar.runtime.launch.worker", help="module that is a rank")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run this node's part of a launch; returns the exit status."""
    said = _arguments(given)
    die_with(said.launcher)
    listener = Listener() if said.stdin else None
    error: MemparError | None = None
    try:
        with sigterm_raises():
            try:
                _run(said, listener)
            finally:
                # Sent to a whole job, a signal may come here when the run has ended of it already.
                ignore_signals()
    except Terminated:
        _tell_others(said)
        (_say if said.node_rank == 0 else _say_nothing)("ended by SIGTERM before anything was started")
    except MemparError as failure:
        error = failure
    except Exception as failure:
        traceback.print_exc()
        error = MemparError(
            f"the agent of node {said.node_rank} failed with {type(failure).__name__}: {failure}; a run cannot go on "
            "without one of its nodes; see its traceback in the output, and continue with --resume."
        )
    except KeyboardInterrupt:
        error = MemparError(
            "the launcher is gone, and the ranks of this node with it." if listener and listener.is_lost else "killed."
        )
        error.exit_status = 1 if listener else 130
    if listener is not None:
        tell(error)
    elif error is not None and (said.node_rank == 0 or not _is_said_by_head(error)):
        print(f"mempar: {error}", file=sys.stderr, flush=True)
    return error.exit_status if error else 0


def _is_said_by_head(error: MemparError) -> bool:
    return isinstance(error, RanksFailedError) and error.exit_status != ConfigError.exit_status


def _run(said: argparse.Namespace, listener: Listener | None) -> None:
    root = said.directory
    name = said.node or os.uname().nodename
    if not RunDir(root).config.is_file():
        raise ConfigError(
            f"{root} is no run's directory as seen from node {name}; all nodes of a run share it; put --out on a file "
            "system that all nodes mount at the same place."
        )
    if said.nodes > 1:
        endpoint(said.rendezvous)
    node = Node(
        name=name,
        num_ranks=said.nproc,
        node_rank=said.node_rank,
        num_nodes=said.nodes,
        rendezvous=said.rendezvous,
        attempt=said.attempt if said.nodes > 1 else "",
    )
    with RunLock(root, _say, _LOCK_PATIENCE_SECONDS) if node.is_head else contextlib.nullcontext():
        run_node(
            root,
            node,
            ["--go-on"],
            _say if node.is_head else _say_nothing,
            patience=said.patience,
            also=listener and listener.start,
            worker=said.worker,
        )


def _tell_others(said: argparse.Namespace) -> None:
    """Leave word that this node does not come: the others need not wait for it."""
    paths = RunDir(said.directory)
    if said.nodes > 1 and paths.config.is_file():
        signs = paths.signs(said.attempt)
        with contextlib.suppress(OSError):
            signs.mkdir(parents=True, exist_ok=True)
        record_node_end(signs, NodeEnd(node_rank=said.node_rank, ends=[], stopped_early=signal.SIGTERM.name))


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """The head says it too."""


if __name__ == "__main__":
    sys.exit(main())
