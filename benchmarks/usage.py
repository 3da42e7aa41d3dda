"""Cost of counting how the table is used, as a share of a training step of the smoke recipe.

    python benchmarks/usage.py [--rounds 6] [--out benchmarks/results/usage-cpu.json]

At the default interval every step marks the rows that it read, and one step in `memory.usage_interval`
also tallies its lookups and joins the counts of all ranks. One model is trained in one process, and one
on two ranks with the table in row shards; on each, three kinds of step alternate: counting off, marking
only, and a step of the interval. What is added is timed where it happens, because it is smaller than the
noise of whole steps. Times are processor seconds of a rank on one thread, so that a shared machine does
not blur them and waiting for the other rank does not count. Exits with 1 when counting takes more than
2% of a step.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine import Stopwatch, engine_stepper, on_ranks, random_batches
from machine import describe_machine

WARM_UP = 1
SIDES = ("off", "marking", "interval")
LIMIT = 0.02


def time_usage(rounds: int, num_ranks: int) -> tuple[int, dict[str, list[dict[str, float]]]]:
    """On one rank: the interval; for each kind of step its seconds and, of them, those that counting adds."""
    from mempar.recipes.smoke import smoke
    from mempar.runtime import bringup
    from mempar.runtime.placement import resolve
    from mempar.runtime.schedule import full_rates
    from mempar.runtime.usage import UsageMonitor

    warnings.simplefilter("ignore")
    bringup.join_world()
    torch.set_num_threads(1)
    run = resolve(smoke().with_parallel(mp=num_ranks, mp_rows=num_ranks), num_ranks)
    world, model, stepper = engine_stepper(run)
    optimizers, interval = stepper.optimizers, run.memory.usage_interval
    monitor, histories = UsageMonitor(run, world, model, optimizers, {"memory": 0}), optimizers.histories
    access = model.access["memory"]
    batches = random_batches(run, world.placement.grid.dp_rank(world.rank), num_ranks)
    watch = Stopwatch(time.process_time)
    watch.wrap(histories["memory"], "mark", "counting")
    watch.wrap(monitor, "report", "counting")
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds + WARM_UP):
        for side in SIDES:
            step = interval if side == "interval" else 1
            optimizers.histories = {} if side == "off" else histories
            watch.seconds.clear()
            started = time.process_time()
            if side != "off":
                monitor.watch(step)
                if access.tally is not None:
                    watch.wrap(access.tally, "add", "counting")
            stepper.train(batches, full_rates(run))
            if side != "off":
                monitor.report(step)
            if number >= WARM_UP:
                rows[side].append({"step": time.process_time() - started, "counting": watch.seconds["counting"]})
    bringup.tear_down(world)
    dist.destroy_process_group()
    return interval, rows


def report(name: str, interval: int, rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print one model's figures; return what is saved."""
    step_ms = {side: 1e3 * min(row["step"] for row in rows[side]) for side in SIDES}
    added_ms = {side: 1e3 * statistics.median(row["counting"] for row in rows[side]) for side in SIDES[1:]}
    overhead = (added_ms["marking"] + (added_ms["interval"] - added_ms["marking"]) / interval) / step_ms["off"]
    print(
        f"{name}: step {step_ms['off']:.0f} ms off, {step_ms['marking']:.0f} marking, {step_ms['interval']:.0f} in the "
        f"interval's step; counting adds {added_ms['marking']:.3f} ms to each and {added_ms['interval']:.1f} ms to one "
        f"in {interval}: {overhead:.3%} of a step"
    )
    return {"step_ms": step_ms, "added_ms": added_ms, "overhead": overhead}


def main() -> int:
    """Measure, print, save; 1 when counting costs more than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    figures = {}
    for num_ranks in (1, 2):
        interval, rows = on_ranks(num_ranks, time_usage, arguments.rounds, num_ranks)
        figures[f"{num_ranks}_ranks"] = report(f"{num_ranks} rank(s)", interval, rows)
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")
    return int(any(side["overhead"] > LIMIT for side in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
