"""Starting the ranks of a run on this machine, with torchrun's agent; a single rank runs in-process."""

import importlib.util
import sys
import warnings
from pathlib import Path

from mempar.errors import ConfigError, MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import place
from mempar.runtime.worker import run_rank


def check_run(run: RunConfig, num_ranks: int) -> None:
    """Refuse, before anything is started or written, what could not run.

    Raises:
        ConfigError: with the numbers.
    """
    place(run, num_ranks)
    if run.parallel.cp > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"parallel.cp={run.parallel.cp} needs TransformerEngine's attention, which is not installed; megatron's "
            "own attention sees one context-parallel rank's tokens only; use parallel.cp=1, or install the extra "
            "`gpu` on a CUDA machine."
        )


def launch_local(directory: Path, num_ranks: int, load: Path | None) -> None:
    """Run `directory/config.yaml` on `num_ranks` processes of this machine and wait for them.

    Args:
        directory: the run's directory.
        num_ranks: processes.
        load: checkpoint to continue from.

    Raises:
        MemparError: when a rank failed; its own message was printed by it.
    """
    if num_ranks == 1:
        run_rank(directory, load)
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
    arguments = ["-m", "mempar.runtime.worker", str(directory), *([str(load)] if load else [])]
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        failed = MemparError(
            f"rank {rank} of {num_ranks} ended with status {failure.exitcode}; the run cannot go on without it; "
            "see its output above."
        )
        if failure.exitcode == ConfigError.exit_status:
            failed.exit_status = ConfigError.exit_status
        raise failed from None
