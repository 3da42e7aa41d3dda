"""Starting the ranks of a run on this machine, with torchrun's agent where there are several."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

from mempar.errors import ConfigError, MemparError


def launch_local(directory: Path, num_ranks: int, load: Path | None) -> None:
    """Run `directory/config.yaml` on `num_ranks` processes of this machine and wait for them.

    Args:
        directory: the run's directory.
        num_ranks: processes.
        load: checkpoint to continue from.

    Raises:
        MemparError: when a rank failed; its own message was printed by it.
    """
    # Threads that wait by spinning starve each other where cores are shared: a step takes many times as
    # long when one other process is busy. libgomp reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = ["-m", "mempar.runtime.worker", str(directory), *([str(load)] if load else [])]
    if num_ranks == 1:
        status = subprocess.run([sys.executable, *arguments], check=False).returncode
        if status:
            raise _failure(f"the only rank ended with status {status}", status)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = f"rank {rank} of {num_ranks} ended with status {failure.exitcode}"
        raise _failure(message, failure.exitcode) from None


def _failure(what: str, status: int) -> MemparError:
    failed = MemparError(f"{what}; the run cannot go on without it; see its output above.")
    if status == ConfigError.exit_status:
        failed.exit_status = ConfigError.exit_status
    return failed
