"""Starting the ranks of a run on this machine, with torchrun's agent where there are several, and seeing them end.

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
from mempar.runtime.launch.endings import BEFORE_STEPS, RankEnd, diagnose
from mempar.runtime.launch.heartbeat import not_writable
from mempar.runtime.launch.stopping import heed_signals
from mempar.runtime.launch.supervisor import Supervisor
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir

_WORKER = "mempar.runtime.launch.worker"
# Threads that wait by spinning starve each other where cores are shared: a step takes many times as long when one other
# process is busy. libgomp reads this when torch is loaded. A shell that becomes the rank sets it, as the agent takes a
# command and no environment, and this process keeps its own; what the user has set stays.
_AS_RANK = ("sh", "-c", 'export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-PASSIVE}"; exec "$@"', "sh")


def launch_local(
    directory: Path,
    num_ranks: int,
    load: Path | None,
    say: Callable[[str], None],
    *,
    launched: float = 0.0,
    worker: str = _WORKER,
) -> None:
    """Run `directory/config.yaml` on `num_ranks` processes of this machine and wait for them.

    Must be called in the main thread: ranks are killed when the thread that started them ends. SIGTERM and SIGINT
    let the ranks save and leave, and this function return; at a second SIGINT they are killed.

    Args:
        directory: the run's directory, locked.
        num_ranks: processes.
        load: checkpoint to continue from.
        say: prints a line.
        launched: seconds since the epoch from which the time limit counts; now unless given.
        worker: module that is a rank.

    Raises:
        MemparError: when a rank failed, with the one message.
        KeyboardInterrupt: at the second SIGINT.
    """
    paths = RunDir(directory)
    timeout = load_yaml(paths.config).train.collective_timeout
    shutil.rmtree(paths.ranks, ignore_errors=True)
    try:
        paths.ranks.mkdir(exist_ok=True)
    except OSError as error:
        raise not_writable(paths.ranks, error) from None
    arguments = [
        "-m",
        worker,
        str(directory),
        "--launcher",
        str(os.getpid()),
        "--launched",
        str(launched or time.time()),
    ]
    if load is not None:
        arguments += ["--load", str(load)]
    supervisor = Supervisor(paths.ranks, timeout)
    statuses: dict[int, int] = {}
    with heed_signals(supervisor.wish, supervisor.end_now):
        supervisor.start()
        try:
            statuses = _run_one(arguments) if num_ranks == 1 else _run_with_agent(arguments, num_ranks, directory.name)
        finally:
            ends = supervisor.finish(statuses)
        _judge(supervisor, ends, timeout, say)
        shutil.rmtree(paths.ranks, ignore_errors=True)


def _run_one(arguments: list[str]) -> dict[int, int]:
    # A session of its own, as the agent's ranks have: ^C reaches the launcher alone, which passes it on.
    with subprocess.Popen([*_AS_RANK, sys.executable, *arguments, "--rank", "0"], start_new_session=True) as process:
        return {0: process.wait()}


def _run_with_agent(arguments: list[str], num_ranks: int, run_id: str) -> dict[int, int]:
    """Run ranks under torchrun's agent; returns the exit statuses of those that failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.utils import macros
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells of every signal that it sends; the one message comes from us.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # Otherwise an empty directory a launch stays behind.
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGQUIT",
    )
    try:
        # With one host the number on this machine is that in the world.
        shell, *options = _AS_RANK
        elastic_launch(config, shell)(*options, sys.executable, *arguments, "--rank", macros.local_rank)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        raise MemparError(f"ended by {error.sigval.name}, and the ranks with it; SIGTERM lets a run save.") from None
    return {}


def _judge(supervisor: Supervisor, ends: list[RankEnd], timeout: float, say: Callable[[str], None]) -> None:
    """Say how a run ended, or raise it."""
    failed = [end for end in ends if end.status]
    if supervisor.interrupted:
        raise KeyboardInterrupt
    if supervisor.stopped_early or _all_ended_early(failed):
        reason = supervisor.wished or "SIGTERM"
        say(f"ended by {reason} before the first step, with nothing new to save; start it again with --resume")
    elif failed:
        raise diagnose(ends, timeout, supervisor.failed_at)


def _all_ended_early(failed: list[RankEnd]) -> bool:
    """Whether a signal ended ranks before they could heed it, and nothing else did; nothing was done by then."""
    by_themselves = [end for end in failed if not end.killed]
    signals = (-signal.SIGTERM, -signal.SIGINT)
    return bool(by_themselves) and all(end.place == BEFORE_STEPS and end.status in signals for end in by_themselves)
