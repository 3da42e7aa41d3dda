"""Starting the ranks of a run on this node, with torchrun's agent where there are several, and seeing them end.

The agent waits and restarts; signals and verdicts are ours: it would pass on SIGTERM, give ranks 30 seconds and end
with status 1, where a save may take longer and the run then has ended well. So the agent is left SIGQUIT alone, and a
`Supervisor` beside it passes signals on, kills what does not end, and knows why.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from mempar.errors import MemparError
from mempar.runtime.launch.endings import BEFORE_STEPS, RankEnd, diagnose, is_own_fault
from mempar.runtime.launch.heartbeat import not_writable
from mempar.runtime.launch.nodes import Node, comes_true, gather, meeting_interface, part, this_host
from mempar.runtime.launch.stopping import heed_signals
from mempar.runtime.launch.supervisor import Supervisor
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir

_WORKER = "mempar.runtime.launch.worker"
# Threads that wait by spinning starve each other where cores are shared: a step takes many times as long when one other
# process is busy. libgomp reads this when torch is loaded. A shell that becomes the rank sets it, as the agent takes a
# command and no environment, and this process keeps its own; what the user has set stays.
_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
# For which torchrun's agent puts a rank's number on its node.
_LOCAL_RANK = "${local_rank}"
# Exit statuses of ranks that were told to end before they could heed it.
_ENDING = (-signal.SIGTERM, -signal.SIGINT)
# For torchrun's agents, which begin when all nodes have come.
_AGENT_SECONDS = 60


def launch_local(
    directory: Path,
    num_ranks: int,
    load: Path | None,
    say: Callable[[str], None],
    *,
    launched: float = 0.0,
    worker: str = _WORKER,
) -> None:
    """Run `directory/config.yaml` on `num_ranks` processes of this machine; see `run_node`.

    Args:
        directory: the run's directory, locked.
        num_ranks: processes.
        load: checkpoint to continue from.
        say: prints a line.
        launched: seconds since the epoch from which the time limit counts; now unless given.
        worker: module that is a rank.
    """
    arguments = ["--load", str(load)] if load is not None else []
    run_node(directory, this_host(num_ranks), arguments, say, launched=launched, worker=worker)


def run_node(
    directory: Path,
    node: Node,
    arguments: list[str],
    say: Callable[[str], None],
    *,
    launched: float = 0.0,
    patience: float = 0.0,
    also: Callable[[Supervisor], None] | None = None,
    worker: str = _WORKER,
) -> None:
    """Run `directory/config.yaml` on this node's processes and wait for them.

    Must be called in the main thread: ranks are killed when the thread that started them ends. SIGTERM and SIGINT
    let the ranks save and leave, and this function return; at a second SIGINT they are killed.

    Args:
        directory: the run's directory, locked.
        node: this one.
        arguments: of the rank, beside those that every rank gets.
        say: prints a line.
        launched: seconds since the epoch from which the time limit counts; now unless given.
        patience: seconds to wait for other nodes.
        also: given the supervisor when it has started, to tell it what else asks the run to end.
        worker: module that is a rank.

    Raises:
        MemparError: when a rank failed, with the one message.
        KeyboardInterrupt: at the second SIGINT.
    """
    paths = RunDir(directory)
    timeout = load_yaml(paths.config).train.collective_timeout
    signs = paths.signs(node.attempt)
    try:
        if node.num_nodes == 1:
            shutil.rmtree(signs, ignore_errors=True)
        signs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(signs, error) from None
    command = [sys.executable, "-m", worker, str(directory), *arguments]
    command += ["--launcher", str(os.getpid()), "--launched", str(launched or time.time())]
    command += ["--first-rank", str(node.first_rank)]
    command += ["--node", node.name, "--attempt", node.attempt] if node.num_nodes > 1 else []
    supervisor = Supervisor(signs, timeout, node)
    statuses: dict[int, int] = {}
    with heed_signals(supervisor.wish, supervisor.end_now):
        supervisor.start()
        if also is not None:
            also(supervisor)
        try:
            statuses = _run(command, node, supervisor, patience)
        finally:
            ends = supervisor.finish(statuses)
        _judge(supervisor, ends, timeout, say)
        # Other nodes may still have to read that this one was stopped.
        if node.is_head and not (supervisor.stopped_early and node.num_nodes > 1):
            shutil.rmtree(paths.ranks, ignore_errors=True)


def _run(command: list[str], node: Node, supervisor: Supervisor, patience: float) -> dict[int, int]:
    """Run the ranks; returns the exit statuses of those that failed."""
    if node.num_nodes == 1 and node.num_ranks == 1:
        # A session of its own, as the agent's ranks have: ^C reaches the launcher alone, which passes it on.
        with subprocess.Popen([*_with_defaults(_DEFAULTS), *command, "--rank", "0"], start_new_session=True) as process:
            return {0: process.wait()}
    if node.num_nodes == 1:
        return _run_with_agent([*command, "--rank", _LOCAL_RANK], node, _DEFAULTS)
    statuses = run_together([*command, "--rank", _LOCAL_RANK], node, patience, lambda: supervisor.is_told_to_end)
    if statuses is None:
        supervisor.stopped_early = True
    return statuses or {}


def run_together(
    command: list[str], node: Node, patience: float, given_up: Callable[[], bool]
) -> dict[int, int] | None:
    """Run one of several nodes' ranks when all nodes have come; every node must call it, in its main thread.

    Args:
        command: that is a rank.
        node: this one; there are several.
        patience: seconds to wait for the others.
        given_up: looked at while it waits.

    Returns:
        The exit statuses of the ranks that failed, here or elsewhere; None when it was given up before they started.

    Raises:
        ConfigError: when the head's port is in use.
        MemparError: when the nodes do not come together.
    """
    # Not between the two meetings, where somebody might leave.
    _import_agent()
    # Kept until the ranks have ended: they meet in it.
    store = gather(node, patience, given_up)
    if store is None:
        return None
    # Sockets of gloo are bound to the address that the host's own name has, which is often that of no interface.
    interface = meeting_interface(node, store)
    defaults = {**_DEFAULTS, **({"GLOO_SOCKET_IFNAME": interface} if interface else {})}
    try:
        failed = _run_with_agent(command, node, defaults)
        if not failed:
            part(node, store)
        return failed
    except RuntimeError as error:
        if comes_true(given_up):
            return None
        raise MemparError(
            f"node {node.name} lost the others when its ranks were to start ({str(error).splitlines()[0]}); a run "
            "needs all of its nodes; see what they say."
        ) from None


def _with_defaults(defaults: dict[str, str]) -> list[str]:
    """A shell that sets what the user has not set in the environment, and becomes the command that follows."""
    exports = "".join(f'export {name}="${{{name}-{value}}}"; ' for name, value in defaults.items())
    return ["sh", "-c", f'{exports}exec "$@"', "sh"]


def _run_with_agent(command: list[str], node: Node, defaults: dict[str, str]) -> dict[int, int]:
    """Run ranks under torchrun's agent; returns the exit statuses of those that failed."""
    _import_agent()
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells of every signal that it sends; the one message comes from us.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = node.num_nodes == 1
    config = LaunchConfig(
        min_nodes=node.num_nodes,
        max_nodes=node.num_nodes,
        nproc_per_node=node.num_ranks,
        run_id=node.attempt or "run",
        # Static: ranks are numbered by their nodes' order, which decides who shares a node.
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else node.rendezvous,
        rdzv_configs={} if alone else {"rank": node.node_rank, "timeout": _AGENT_SECONDS},
        max_restarts=0,
        # Otherwise an empty directory a launch stays behind.
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGQUIT",
    )
    try:
        shell, *options = _with_defaults(defaults)
        elastic_launch(config, shell)(*options, *command)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        raise MemparError(f"ended by {error.sigval.name}, and the ranks with it; SIGTERM lets a run save.") from None
    return {}


def _import_agent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed.launcher.api  # noqa: F401


def _judge(supervisor: Supervisor, ends: list[RankEnd], timeout: float, say: Callable[[str], None]) -> None:
    """Say how a run ended, or raise it."""
    failed = [end for end in ends if end.status]
    if supervisor.interrupted:
        raise KeyboardInterrupt
    # At one node's failure a scheduler tells the others to end: that is no reason of its own.
    faulty = any(is_own_fault(end, timeout) and end.status not in _ENDING for end in ends)
    if (supervisor.stopped_early and not faulty) or _all_ended_early(failed):
        reason = supervisor.wished or "SIGTERM"
        say(f"ended by {reason} before the first step, with nothing new to save; start it again with --resume")
    elif failed:
        raise diagnose(ends, timeout, supervisor.failed_at)


def _all_ended_early(failed: list[RankEnd]) -> bool:
    """Whether a signal ended ranks before they could heed it, and nothing else did; nothing was done by then."""
    by_themselves = [end for end in failed if not end.killed]
    return bool(by_themselves) and all(end.place == BEFORE_STEPS and end.status in _ENDING for end in by_themselves)
