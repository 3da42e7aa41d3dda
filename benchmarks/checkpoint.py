"""Speed of saving and loading a checkpoint beside `cp` of the same bytes, and how long training waits for a save.

    python benchmarks/checkpoint.py [--pairs 5] [--ranks 1] [--subkeys 512] [--out FILE.json]

One side after the other, alternating: a save (`Save`, to its manifest's fsync), a load into the same layout, and
`cp -r --reflink=never` of the saved directory with an fsync of every file it made. Reported are median throughputs and
their ratios to cp's. Then two runs of the same steps with one save among them, at once and asynchronous, against steps
without: what the save adds to the steps around it, as a share of what it adds at once.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from engine import describe_machine, engine_stepper, make_run, on_ranks, random_batches

# Steps that warm up, and steps that are measured on either side of a save: longer together than writing takes.
STEPS = (2, 24)


def checkpoint_run(num_subkeys: int, ranks: int, *, asynchronous: bool) -> Any:
    """A run whose checkpoint is mostly a table: values and moments of num_subkeys^2 rows of 256 numbers."""
    from mempar.runtime.checkpoint.config import CheckpointConfig
    from mempar.runtime.config import ParallelConfig

    run = make_run(num_subkeys)
    return dataclasses.replace(
        run,
        # Small batches: what is measured is the time between them.
        train=dataclasses.replace(run.train, micro_batch_size=1, global_batch_size=2),
        parallel=ParallelConfig(mp=ranks),
        checkpoint=CheckpointConfig(asynchronous=asynchronous),
    )


def sync_and_time(started: float) -> float:
    """Seconds since then, when all ranks have come."""
    dist.barrier()
    return time.perf_counter() - started


def time_pairs(num_subkeys: int, ranks: int, pairs: int, directory: str) -> dict[str, list[float]]:
    """Save, load and copy, alternating; seconds of each, and bytes."""
    from mempar.runtime import bringup
    from mempar.runtime.checkpoint.loading import load_checkpoint
    from mempar.runtime.checkpoint.manifest import read_manifest
    from mempar.runtime.checkpoint.saving import Save

    run = checkpoint_run(num_subkeys, ranks, asynchronous=False)
    bringup.join_world()
    world, model, stepper = engine_stepper(run)
    rank = world.rank
    path, copy = Path(directory) / "step_00000001", Path(directory) / "copy"
    times: dict[str, list[float]] = {"save": [], "load": [], "cp": [], "bytes": []}
    progress = {"step": 1, "applied_steps": 1}
    for _ in range(pairs + 1):
        started = time.perf_counter()
        Save(path, run, world, model, stepper.optimizers, {"progress": progress}).finish()
        times["save"].append(sync_and_time(started))
        started = time.perf_counter()
        load_checkpoint(read_manifest(path), world, model, stepper.optimizers)
        times["load"].append(sync_and_time(started))
        started = time.perf_counter()
        if rank == 0:
            subprocess.run(["cp", "-r", "--reflink=never", path, copy], check=True)
            files = [file for file in copy.rglob("*") if file.is_file()]
            subprocess.run(["sync", *files], check=True)
        times["cp"].append(sync_and_time(started))
        if rank == 0:
            times["bytes"].append(sum(file.stat().st_size for file in files))
            shutil.rmtree(copy)
            shutil.rmtree(path)
            os.sync()
        dist.barrier()
    # The first pair warms up.
    return {side: of_side[1:] for side, of_side in times.items()}


def time_steps(num_subkeys: int, ranks: int, directory: str, asynchronous: bool) -> dict[str, Any]:
    """Seconds of steps around a save, and of the same number of steps without."""
    from mempar.runtime import bringup
    from mempar.runtime.checkpoint.saving import Save
    from mempar.runtime.schedule import full_rates

    run = checkpoint_run(num_subkeys, ranks, asynchronous=asynchronous)
    bringup.join_world()
    world, model, stepper = engine_stepper(run)
    rank = world.rank
    batches = random_batches(run, world.placement.grid.dp_rank(rank), world.placement.grid.dp)
    path = Path(directory) / "step_00000001"

    def steps(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            stepper.train(batches, full_rates(run))
            seconds.append(time.perf_counter() - started)
        return seconds

    steps(STEPS[0])
    before = steps(STEPS[1])
    started = time.perf_counter()
    save = Save(path, run, world, model, stepper.optimizers, {"progress": {"step": 1, "applied_steps": 1}})
    if not asynchronous:
        save.finish()
    begun = time.perf_counter() - started
    during = steps(STEPS[1])
    started = time.perf_counter()
    if asynchronous:
        save.finish()
    finished = time.perf_counter() - started
    usual = statistics.median(before)
    added = begun + sum(during) - STEPS[1] * usual + finished
    dist.barrier()
    if rank == 0:
        shutil.rmtree(path)
    return {"step": usual, "begun": begun, "finished": finished, "added": added}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating measurements of each side")
    parser.add_argument("--ranks", type=int, default=1, help="ranks, each with a row shard of the table")
    parser.add_argument("--subkeys", type=int, default=512, help="square root of the table's rows")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = (arguments.subkeys, arguments.ranks)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        times = on_ranks(arguments.ranks, time_pairs, *sizes, arguments.pairs, directory)
        waits = {
            name: [on_ranks(arguments.ranks, time_steps, *sizes, directory, name == "asynchronous") for _ in range(3)]
            for name in ("at_once", "asynchronous")
        }
    num_bytes = times.pop("bytes")[0]
    speeds = {side: num_bytes / 2**20 / statistics.median(seconds) for side, seconds in times.items()}
    for side, speed in speeds.items():
        print(f"{side:>5} {speed:8.0f} MiB/s   {speed / speeds['cp']:.2f} of cp")
    added = {name: statistics.median(of["added"] for of in found) for name, found in waits.items()}
    steps = {name: statistics.median(of["step"] for of in found) for name, found in waits.items()}
    for name, seconds in added.items():
        print(f"a save {name.replace('_', ' ')} adds {seconds:.2f} s to {STEPS[1]} steps of {steps[name]:.2f} s")
    figures = {
        "mib": num_bytes / 2**20,
        "ranks": arguments.ranks,
        "mib_per_s": speeds,
        "save_over_cp": speeds["save"] / speeds["cp"],
        "load_over_cp": speeds["load"] / speeds["cp"],
        "added_seconds": added,
        "asynchronous_over_at_once": added["asynchronous"] / added["at_once"],
        "samples": {**times, **waits},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
