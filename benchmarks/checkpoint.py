"""Speed of saving and loading a checkpoint beside `cp` of the same bytes, and how long training waits for a save.

    python benchmarks/checkpoint.py [--pairs 5] [--ranks 1] [--subkeys 512] [--out FILE.json]

One side after the other, alternating: a save (`Save`, to its manifest's fsync), a load into the same layout, and
`cp -r --reflink=never` of the saved directory with an fsync of every file it made. Reported are median throughputs and
their ratios to cp's. Then the same steps without a save, with one at once and with an asynchronous one, alternating:
what each save adds to the steps around it.
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

import torch
import torch.distributed as dist
from engine import engine_stepper, make_run, on_ranks, random_batches
from machine import describe_machine

# Steps around a save: longer together than writing takes.
STEPS = 16
SAVES = ("at_once", "asynchronous")
PROGRESS = {"step": 1, "applied_steps": 1}


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
    for _ in range(pairs + 1):
        started = time.perf_counter()
        Save(path, run, world, model, stepper.optimizers, {"progress": PROGRESS}).finish()
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


def time_steps(num_subkeys: int, ranks: int, pairs: int, directory: str) -> dict[str, list[float]]:
    """Seconds that training takes for the same steps, alternating: without a save, with one at once, with one beside.

    A save's seconds are those from its call to the end of the steps, or to its own end where that is later.
    """
    from mempar.runtime import bringup
    from mempar.runtime.checkpoint.saving import Save
    from mempar.runtime.schedule import full_rates

    runs = {name: checkpoint_run(num_subkeys, ranks, asynchronous=name == "asynchronous") for name in SAVES}
    bringup.join_world()
    # As beside a GPU, training leaves a core to the writers.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks - 1))
    run = runs["at_once"]
    world, model, stepper = engine_stepper(run)
    rank = world.rank
    batches = random_batches(run, world.placement.grid.dp_rank(rank), world.placement.grid.dp)
    path = Path(directory) / "step_00000001"
    times: dict[str, list[float]] = {side: [] for side in ("steps", *SAVES, *(f"{name}_blocks" for name in SAVES))}
    for _ in range(pairs + 1):
        for side in ("steps", *SAVES):
            dist.barrier()
            started = time.perf_counter()
            save = None
            if side in SAVES:
                save = Save(path, runs[side], world, model, stepper.optimizers, {"progress": PROGRESS})
                if side == "at_once":
                    save.finish()
                times[f"{side}_blocks"].append(time.perf_counter() - started)
            for _ in range(STEPS):
                stepper.train(batches, full_rates(run))
            if side == "asynchronous" and save is not None:
                save.finish()
            times[side].append(sync_and_time(started))
            if rank == 0 and save is not None:
                shutil.rmtree(path)
                os.sync()
    # The first pair warms up.
    return {side: of_side[1:] for side, of_side in times.items()}


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
        waits = on_ranks(arguments.ranks, time_steps, *sizes, arguments.pairs, directory)
    num_bytes = times.pop("bytes")[0]
    speeds = {side: num_bytes / 2**20 / statistics.median(seconds) for side, seconds in times.items()}
    for side, speed in speeds.items():
        print(f"{side:>5} {speed:8.0f} MiB/s   {speed / speeds['cp']:.2f} of cp")
    added = {
        name: statistics.median(save - plain for save, plain in zip(waits[name], waits["steps"], strict=True))
        for name in SAVES
    }
    for name, seconds in added.items():
        blocks = statistics.median(waits[f"{name}_blocks"])
        print(
            f"a save {name.replace('_', ' ')} stops training for {blocks:.2f} s, adds {seconds:.2f} s to {STEPS} steps"
        )
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
