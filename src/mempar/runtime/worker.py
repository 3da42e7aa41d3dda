"""One rank of a run: `python -m mempar.runtime.worker RUN_DIR [CHECKPOINT]`, started by launch.py."""

import ctypes
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from mempar.errors import MemparError
from mempar.runtime import bringup
from mempar.runtime.overrides import load_yaml
from mempar.runtime.run_dir import RunDir
from mempar.runtime.train import Trainer

_PR_SET_PDEATHSIG = 1


def run_rank(directory: Path, load: Path | None) -> None:
    """Train the run that `directory/config.yaml` describes, on this rank."""
    paths = RunDir(directory)
    run = load_yaml(paths.config)
    bringup.join_world(run.train.collective_timeout)
    world = bringup.lay_out(run)
    Trainer(run, world, paths, load).train()
    bringup.tear_down(world)
    dist.destroy_process_group()


def main() -> int:
    """Run a rank as a process of its own; returns the exit status."""
    directory, *rest = sys.argv[1:]
    if sys.platform == "linux":
        # A rank must not outlive its launcher.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        run_rank(Path(directory), Path(rest[0]) if rest else None)
    except MemparError as error:
        # All ranks refuse alike; one of them says so.
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"mempar: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
