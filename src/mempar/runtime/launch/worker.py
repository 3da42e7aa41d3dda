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
from collections.abc import Callable
from pathlib import Path

from mempar.errors import DamagedError, MemparError
from mempar.runtime.launch.endings import record_failure
from mempar.runtime.launch.going_on import pass_over, starting_point
from mempar.runtime.launch.heartbeat import Heartbeat
from mempar.runtime.launch.lock import share_lock
from mempar.runtime.launch.parent import die_with
from mempar.runtime.launch.stopping import Stopping, heed_signals, ignore_signals
from mempar.runtime.run_dir import RunDir


def run_rank(
    paths: RunDir, load: Path | None, launched: float, stopping: Stopping, heartbeat: Heartbeat, *, go_on: bool = False
) -> None:
    """Train the run that lies in a directory, on this rank.

    Args:
        paths: of the run.
        load: checkpoint to continue from.
        launched: seconds since the epoch from which the time limit counts.
        stopping: what signals to this process ask for.
        heartbeat: this rank's signs of life.
        go_on: find out what to continue from.
    """
    # Megatron's distributed optimizer calls collectives by names that torch is renaming: no news to whoever trains.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    import torch.distributed as dist

    from mempar.runtime import bringup
    from mempar.runtime.checkpoint.together import on_main
    from mempar.runtime.overrides import load_yaml
    from mempar.runtime.train import Trainer

    run = load_yaml(paths.config)
    stopping.limit(launched, run.train.time_limit_minutes)
    bringup.join_world(run.train.collective_timeout)
    heartbeat.identify(dist.get_rank())
    world = bringup.lay_out(run)
    if go_on:
        # One rank looks: the others might not see the same, over a network.
        load = on_main(world, None, lambda said: starting_point(paths, run, print))
    try:
        trainer = Trainer(run, world, paths, load, stopping, heartbeat)
    except DamagedError as error:
        if not go_on or load is None:
            raise
        raise pass_over(load, paths, error, writes=world.is_main) from None
    if load is not None and world.is_main:
        print(f"{'goes on' if load.parent == paths.checkpoints else 'starts'} from {load}", flush=True)
    trainer.train()
    bringup.tear_down(world)
    dist.destroy_process_group()


def main(job: Callable[..., None] | None = None) -> int:
    """Run a rank as a process of its own; returns the exit status.

    Args:
        job: what it does, with the arguments of `run_rank`; that unless given.
    """
    parser = argparse.ArgumentParser(prog="mempar.runtime.launch.worker")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--load", type=Path, help="checkpoint to continue from")
    parser.add_argument("--launcher", type=int, default=0, help="process that started this one and tells of failures")
    parser.add_argument("--parent", type=int, default=0, help="process that started this one, with which it ends")
    parser.add_argument("--launched", type=float, default=0.0, help="seconds since the epoch")
    parser.add_argument("--rank", type=int, default=-1, help="on its node, known before the environment is read")
    parser.add_argument("--first-rank", type=int, default=0, help="of its node, in the world")
    parser.add_argument("--node", default="", help="name of its node, if there are several")
    parser.add_argument("--attempt", default="", help="name of this start of the run, if there are several nodes")
    parser.add_argument("--go-on", action="store_true", help="continue from the newest good checkpoint of the run")
    given = parser.parse_args()
    paths = RunDir(given.directory)
    signs = paths.signs(given.attempt)
    die_with(given.launcher or given.parent)
    exists = paths.root.is_dir()
    try:
        heartbeat, stopping = Heartbeat(signs if exists else None, given.node), Stopping()
    except MemparError as error:
        print(f"mempar: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    heartbeat.identify(given.first_rank + given.rank if given.rank >= 0 else -1)
    with heed_signals(stopping.wish):
        lock = share_lock(paths.root)
        try:
            if heartbeat.stack_path is not None:
                # Works in native code too, where handlers in Python have to wait.
                faulthandler.register(signal.SIGUSR1, file=heartbeat.stack_path.open("w"))
            launched = given.launched or time.time()
            (job or run_rank)(paths, given.load, launched, stopping, heartbeat, go_on=given.go_on)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as error:
            recorded = exists and _is_recorded(signs, heartbeat.sign.rank, error)
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
