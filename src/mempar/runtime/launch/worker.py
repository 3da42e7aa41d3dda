"""One rank of a run: `python -m mempar.runtime.launch.worker RUN_DIR`, started by local.py.

What a rank needs to end well comes before the seconds that importing torch takes: it dies with its launcher, gives
signs of life, holds the run's lock and heeds signals.
"""

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from mempar.errors import MemparError
from mempar.runtime.launch.endings import record_failure
from mempar.runtime.launch.heartbeat import Heartbeat
from mempar.runtime.launch.lock import share_lock
from mempar.runtime.launch.parent import die_with
from mempar.runtime.launch.stopping import Stopping, heed_signals, ignore_signals
from mempar.runtime.run_dir import RunDir


def run_rank(paths: RunDir, load: Path | None, launched: float, stopping: Stopping, heartbeat: Heartbeat) -> None:
    """Train the run that lies in a directory, on this rank.

    Args:
        paths: of the run.
        load: checkpoint to continue from.
        launched: seconds since the epoch from which the time limit counts.
        stopping: what signals to this process ask for.
        heartbeat: this rank's signs of life.
    """
    # Megatron's distributed optimizer calls collectives by names that torch is renaming: no news to whoever trains.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    import torch.distributed as dist

    from mempar.runtime import bringup
    from mempar.runtime.overrides import load_yaml
    from mempar.runtime.train import Trainer

    run = load_yaml(paths.config)
    stopping.limit(launched, run.train.time_limit_minutes)
    bringup.join_world(run.train.collective_timeout)
    heartbeat.identify(dist.get_rank())
    world = bringup.lay_out(run)
    Trainer(run, world, paths, load, stopping, heartbeat).train()
    bringup.tear_down(world)
    dist.destroy_process_group()


def main() -> int:
    """Run a rank as a process of its own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mempar.runtime.launch.worker")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--load", type=Path, help="checkpoint to continue from")
    parser.add_argument("--launcher", type=int, default=0, help="process that started this one and tells of failures")
    parser.add_argument("--launched", type=float, default=0.0, help="seconds since the epoch")
    parser.add_argument("--rank", type=int, default=-1, help="if it is known before the environment is read")
    given = parser.parse_args()
    paths = RunDir(given.directory)
    die_with(given.launcher)
    exists = paths.root.is_dir()
    try:
        heartbeat, stopping = Heartbeat(paths.ranks if exists else None), Stopping()
    except MemparError as error:
        print(f"mempar: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    heartbeat.identify(given.rank)
    with heed_signals(stopping.wish):
        lock = share_lock(paths.root)
        try:
            if heartbeat.stack_path is not None:
                # Works in native code too, where handlers in Python have to wait.
                faulthandler.register(signal.SIGUSR1, file=heartbeat.stack_path.open("w"))
            run_rank(paths, given.load, given.launched or time.time(), stopping, heartbeat)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as error:
            recorded = exists and _is_recorded(paths.ranks, heartbeat.sign.rank, error)
            told = isinstance(error, MemparError)
            if not given.launcher or not recorded:
                # Nobody else will.
                print(f"mempar: {error}" if told else traceback.format_exc(), file=sys.stderr, flush=True)
            return error.exit_status if told else 1
        finally:
            ignore_signals()
            if lock is not None:
                lock.close()
    return 0


def _is_recorded(directory: Path, rank: int, error: Exception) -> bool:
    """Leave behind what this rank raised, if the disk takes it: what fills it must not hide what went wrong."""
    try:
        record_failure(directory, rank, error)
    except OSError:
        return False
    return True


def leave(status: int) -> None:
    """End this process; at once if it failed."""
    if status:
        sys.stdout.flush()
        # Groups with a dead member may take their time to be torn down; the others wait for this one's sockets.
        os._exit(status)


if __name__ == "__main__":
    leave(main())
