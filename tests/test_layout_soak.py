"""The layout law on layouts, models and batches that are drawn at random, for as long as it is let.

    make soak ARGS="tests/test_layout_soak.py"        five minutes
    MEMPAR_SOAK_SECONDS=3600 make soak ...            longer

The float64 leg: the same slots, losses to 1e-9 and norms to 1e-6 over 20 steps. What was drawn, and the
worst deviations, are left in benchmarks/results/.
"""

import contextlib
import datetime
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from layout_cases import AXES, is_possible
from layout_runs import STEPS
from mempar.errors import ConfigError
from mempar.runtime.config import ParallelConfig, RunConfig
from mempar.runtime.placement import place, resolve
from rank_pool import RankPool
from test_layout_law import FLOAT64_LOSS, FLOAT64_NORM, largest_deviation
from toy import joined, toy_run, train

MOE_KINDS = ("moe", "memory+moe", "memory_plus+moe", "peer+moe")
SECONDS = float(os.environ.get("MEMPAR_SOAK_SECONDS", "300"))
MOST_RANKS = 8
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def drawn_run(seed: int) -> tuple[int, RunConfig]:
    """A number of ranks and a toy run that can be laid out on them, all as likely as another."""
    draw = random.Random(seed)
    while True:
        try:
            world, run = _any_run(draw)
            if run is None or not 2 <= world <= MOST_RANKS:
                continue
            run = resolve(run, world)
            place(run, world)
        except ConfigError:
            # More column shards than tiles; experts under tensor parallelism alone.
            continue
        return world, run


def _any_run(draw: random.Random) -> tuple[int, RunConfig | None]:
    tp, pp, dp = draw.choice((1, 2)), draw.choice((1, 2, 4)), draw.randint(1, MOST_RANKS)
    stage = tp * dp
    mp = draw.choice([size for size in range(1, stage + 1) if stage % size == 0])
    sizes: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        # Zero is what `mempar train` resolves: the fewest virtual stages that keep the tables together.
        "vpp": draw.choice((0, 1, 2)) if pp == 2 else 1,
        "sequence_parallel": tp > 1 and draw.random() < 0.5,
        "mp": mp,
        "mp_rows": draw.choice([rows for rows in range(1, mp + 1) if mp % rows == 0]),
    }
    sizes["mp_hops"] = draw.choice((1, 2)) if 1 < sizes["mp_rows"] < mp else 1
    model = {axis: draw.choice(AXES[axis]) for axis in ("optimizer", "tied", "ragged", "extras", "merge")}
    model["kind"] = draw.choice((*AXES["kind"], *MOE_KINDS))
    if "moe" in model["kind"]:
        # Two or four of the toy's experts on each rank.
        sizes["ep"] = draw.choice([size for size in (1, 2) if dp % size == 0])
    axes = {axis: model[axis] for axis in ("kind", "optimizer", "extras", "merge")}
    if not is_possible(stage * pp, sizes, leg="float64", **axes):
        return stage * pp, None
    run = toy_run(dtype="float64", **model, **sizes)
    batch = draw.randint(1, 13)
    train = replace(
        run.train,
        global_batch_size=batch,
        micro_batch_size=draw.randint(1, min(3, batch)),
        recompute=draw.choice(AXES["recompute"]),
        recompute_modules=draw.choice((("mlp",), ("core_attn",), ("mlp", "core_attn"))),
    )
    return stage * pp, replace(run, train=train)


def alone(run: RunConfig) -> RunConfig:
    """The same run in a single process that merges nothing, keeps its activations and has no padding."""
    memories = [replace(memory, merge_duplicates="off") for memory in (run.memory, *run.more_memories)]
    return replace(
        run,
        memory=memories[0],
        more_memories=tuple(memories[1:]),
        parallel=ParallelConfig(),
        train=replace(run.train, recompute="none", micro_batch_size=1),
    )


def deviations(pool: RankPool, world: int, run: RunConfig) -> dict[str, float]:
    """Compare a run with the single process; the slots must be the same."""
    many, one = (
        pool.submit(world, train, run, STEPS, None, ("slots",)),
        pool.submit(1, train, alone(run), STEPS, None, ("slots",)),
    )
    history, reference = joined(run, many.result()), joined(alone(run), one.result())
    assert len(history.reports) == STEPS
    assert history.trace.slots.keys() == reference.trace.slots.keys()
    for key, slots in reference.trace.slots.items():
        np.testing.assert_array_equal(history.trace.slots[key], slots, err_msg=f"(step, block, sample) = {key}")
    return {
        "loss": largest_deviation(history, reference, "loss"),
        "norms": largest_deviation(history, reference, "grad_norm", "memory_grad_norm"),
    }


@pytest.mark.soak
def test_float64_run_equals_single_process_in_layouts_drawn_at_random(pool: RankPool, note_figure) -> None:
    rows: list[dict[str, Any]] = []

    def play(seed: int) -> None:
        world, run = drawn_run(seed)
        row: dict[str, Any] = {
            "seed": seed,
            "ranks": world,
            **{name: size for name, size in asdict(run.parallel).items() if size not in (1, False)},
            **{
                name: getattr(run.train, name)
                for name in ("global_batch_size", "micro_batch_size", "recompute", "recompute_modules")
            },
            "memories": [
                (m.variant, m.layers, m.beside, m.optimizer, m.qk_norm, m.merge_duplicates)
                for m in run.memories.values()
            ],
            "experts": run.moe.num_experts,
            "tied": run.model.tie_embeddings,
            "num_subkeys": run.memory.num_subkeys,
            "failure": "in the middle",
        }
        rows.append(row)
        row.update(deviations(pool, world, run))
        assert row["loss"] <= FLOAT64_LOSS, row
        assert row["norms"] <= FLOAT64_NORM, row
        del row["failure"]

    try:
        play_for_a_while(play)
    finally:
        worst = {name: max((row[name] for row in rows if name in row), default=0.0) for name in ("loss", "norms")}
        write_results(rows, worst)
    assert rows
    for name, deviation in worst.items():
        note_figure(f"layout law, float64, drawn at random: {name}", deviation)


def play_for_a_while(play: Callable[[int], None]) -> None:
    """Call a function with seeds, all as likely as another, until the time is up; one that fails is called again."""
    end = time.monotonic() + SECONDS
    failed = False

    @settings(
        max_examples=100_000,
        deadline=None,
        database=None,
        # A failure is told as it was drawn: shrinking would take longer than looking at it.
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    # Hypothesis draws small and simple things most often; from a seed all layouts are as likely.
    @given(st.integers(0, 2**32 - 1))
    def draw(seed: int) -> None:
        nonlocal failed
        if time.monotonic() > end and not failed:
            raise _TimeIsUp
        failed = True
        play(seed)
        failed = False

    with contextlib.suppress(_TimeIsUp):
        draw()


class _TimeIsUp(BaseException):
    """Ends the drawing; hypothesis lets through what is not an Exception."""


def write_results(rows: list[dict[str, Any]], worst: dict[str, float]) -> None:
    """Leave what was drawn in a file of today's."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "date": today,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": SECONDS,
        "steps": STEPS,
        "tolerance": {"loss": FLOAT64_LOSS, "norms": FLOAT64_NORM},
        "worst": worst,
        "runs": len(rows),
        "drawn": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"layout-soak-{today}.json").write_text(json.dumps(report, indent=1) + "\n")
