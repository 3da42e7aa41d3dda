"""Time of a training step: plain torch, the engine, and the engine with tables of growing size.

    python benchmarks/engine.py [--steps 5] [--out benchmarks/results/engine-cpu.json]

Everything is measured in one run, sides alternating, and reported as ratios, because machines are
shared: the oracle (tests/oracle.py, a page of plain torch) against the engine without memory in one
process, and memory layers on two ranks with the table in row shards at 65 thousand, 1 million and 4
million slots. What must not depend on the number of slots (gather, exchange, backward, update) is
timed apart from what may (scores, with its square root). Exchanges are timed from the moment when
both ranks have arrived. A step is 2048 tokens, each reading 128 rows 256 wide in three layers, as in
the paper; the largest table and its moments take 12 GiB, so a machine needs 20.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SLOTS = (256**2, 1024**2, 2048**2)
WARM_UP = 2
FLAT_PHASES = ("gather", "exchange", "backward", "update")


def make_run(num_subkeys: int) -> Any:
    """A run of eight blocks 256 wide; `num_subkeys=0` is the dense model."""
    from mempar.memory.config import MemoryConfig
    from mempar.runtime.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

    memory = MemoryConfig(enabled=False)
    if num_subkeys:
        memory = MemoryConfig(layers=(1, 3, 5), num_subkeys=num_subkeys, heads=4, top_k=32, key_dim=64, column_tile=64)
    return RunConfig(
        model=ModelConfig(
            num_layers=8, hidden_size=256, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=768
        ),
        memory=memory,
        parallel=ParallelConfig(mp=2, mp_rows=2) if num_subkeys else ParallelConfig(),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(seq_length=256, micro_batch_size=2, global_batch_size=8),
    )


def random_batches(run: Any, dp_rank: int, dp: int) -> list[Any]:
    """This rank's micro-batches of random tokens."""
    from mempar.runtime.data.samples import Batch

    size, length = run.train.micro_batch_size, run.train.seq_length
    data = torch.randint(0, 257, (run.train.global_batch_size, length + 1), generator=torch.Generator().manual_seed(1))
    return [
        Batch(
            tokens=data[i : i + size, :-1].contiguous(),
            labels=data[i : i + size, 1:].contiguous(),
            loss_mask=torch.ones(size, length),
            position_ids=torch.arange(length).expand(size, -1),
            sample_ids=list(range(i, i + size)),
            sample_counts=[size] * dp,
        )
        for i in range(dp_rank * size, len(data), dp * size)
    ]


class Stopwatch:
    """Sums the time spent in wrapped functions."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()

    def wrap(self, owner: Any, name: str, phase: str, before: Callable[[], Any] = lambda: None) -> None:
        """Time every call of `owner.name` under a phase, without what `before` waits for."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before()
            started = self.clock()
            result = function(*args, **kwargs)
            self.seconds[phase] += self.clock() - started
            return result

        setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)


def engine_stepper(run: Any) -> tuple[Any, Any, Any]:
    """Bring a run up on the joined world."""
    from mempar.runtime import bringup
    from mempar.runtime.model import build_model
    from mempar.runtime.optim import Optimizers
    from mempar.runtime.step import Stepper

    world = bringup.lay_out(run)
    model = build_model(run, world, 257)
    return world, model, Stepper(run, world, model, Optimizers(run, world, model))


def oracle_step(run: Any, model: Any) -> Callable[[], None]:
    """The same training step in plain torch, from the engine's parameters."""
    import oracle
    from mempar.runtime.logical import logical_parameters
    from oracle_runs import oracle_config, oracle_optim

    params = {
        logical.name: logical.param.detach().clone().requires_grad_()
        for logical in logical_parameters(model.chunks[0], tp=1, tp_rank=0, ep_rank=0)
    }
    batches = [(batch.tokens, batch.labels, batch.loss_mask) for batch in random_batches(run, 0, 1)]
    state = oracle.OptimState()
    return lambda: oracle.step(params, state, batches, oracle_config(run), oracle_optim(run))


def time_dense(steps: int) -> dict[str, list[float]]:
    """Seconds of each step of the oracle and of the dense engine, alternating, in this process."""
    from mempar.runtime import bringup
    from mempar.runtime.schedule import full_rates

    bringup.join_world()
    run = make_run(0)
    world, model, stepper = engine_stepper(run)
    batches = random_batches(run, 0, 1)
    plain = oracle_step(run, model)
    seconds: dict[str, list[float]] = {"oracle": [], "engine": []}
    for step in range(steps + WARM_UP):
        for name, function in (("oracle", plain), ("engine", lambda: stepper.train(batches, full_rates(run)))):
            started = time.perf_counter()
            function()
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    bringup.tear_down(world)
    dist.destroy_process_group()
    return seconds


class MemoryBench:
    """The engine with one table size, its phases timed apart; all sizes live side by side on two ranks."""

    def __init__(self, slots: int, world: Any) -> None:
        """Build the model of that size in a world that is already laid out."""
        from mempar.runtime.model import build_model
        from mempar.runtime.optim import Optimizers
        from mempar.runtime.placement import place
        from mempar.runtime.schedule import full_rates
        from mempar.runtime.step import Stepper

        run = make_run(round(slots**0.5))
        # The groups do not depend on the number of slots, the cuts of the table do.
        world = dataclasses.replace(world, placement=place(run, world.size))
        model = build_model(run, world, 257)
        self.stepper = Stepper(run, world, model, Optimizers(run, world, model))
        self.batches = random_batches(run, world.placement.grid.dp_rank(world.rank), 2)
        self.rates = full_rates(run)
        self.phases: list[tuple[Any, str, str]] = [
            (model.tables[0].shard, "gather", "gather"),
            (model.tables[0].shard, "backward", "backward"),
            (model.tables[0].shard, "take_gradient", "backward"),
            (self.stepper.optimizers.tables[model.tables[0].name], "update", "update"),
        ]

    def step(self, watch: Stopwatch) -> dict[str, float]:
        """Train one step; seconds of its phases and of the whole."""

        dist.barrier()
        watch.seconds.clear()
        started = time.perf_counter()
        self.stepper.train(self.batches, self.rates)
        return {"step": time.perf_counter() - started, **watch.seconds}


def time_memory(steps: int) -> dict[int, list[dict[str, float]]]:
    """On one of two ranks: phases of each step for every table size, sizes alternating."""
    import mempar.kernels.product_topk as product_topk
    from mempar.runtime import bringup

    warnings.simplefilter("ignore")
    bringup.join_world()
    torch.set_num_threads(1)
    world = bringup.lay_out(make_run(round(SLOTS[0] ** 0.5)))
    watch = Stopwatch()
    watch.wrap(product_topk._ProductTopk, "forward", "scores")
    watch.wrap(product_topk._ProductTopk, "backward", "scores")
    for group in (world.groups.memory, *world.groups.copies):
        watch.wrap(group, "all_to_all", "exchange", before=dist.barrier)
    sides = {slots: MemoryBench(slots, world) for slots in SLOTS}
    for side in sides.values():
        for phase in side.phases:
            watch.wrap(*phase)
    rows: dict[int, list[dict[str, float]]] = {slots: [] for slots in SLOTS}
    for step in range(steps + WARM_UP):
        for slots, side in sides.items():
            row = side.step(watch)
            if step >= WARM_UP:
                rows[slots].append(row)
    bringup.tear_down(world)
    dist.destroy_process_group()
    return rows


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on ranks of this machine; rank 0's result."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="bench",
    )
    return elastic_launch(config, function)(*arguments)[0]


def least_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """Least time of every phase in milliseconds: on a shared machine noise only adds."""
    return {phase: 1e3 * min(row[phase] for row in rows) for phase in rows[0]}


def report(dense: dict[str, list[float]], memory: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Print the tables; return what is saved."""
    oracle_ms, engine_ms = (1e3 * statistics.median(dense[name]) for name in ("oracle", "engine"))
    ratio = statistics.median(e / o for e, o in zip(dense["engine"], dense["oracle"], strict=True))
    print(f"dense, one process: oracle {oracle_ms:.0f} ms, engine {engine_ms:.0f} ms, engine/oracle {ratio:.2f}")
    least = {slots: least_rows(rows) for slots, rows in memory.items()}
    print("memory, two ranks in row shards, ms a step:")
    print(f"{'slots':>10} {'step':>8} {'scores':>8} " + " ".join(f"{phase:>9}" for phase in FLAT_PHASES))
    for slots, row in least.items():
        phases = " ".join(f"{row[phase]:9.1f}" for phase in FLAT_PHASES)
        print(f"{slots:>10} {row['step']:8.0f} {row['scores']:8.1f} {phases}")
    flat = {slots: sum(row[phase] for phase in FLAT_PHASES) for slots, row in least.items()}
    flat_ratio = flat[SLOTS[2]] / flat[SLOTS[1]]
    score_ratio = least[SLOTS[2]]["scores"] / least[SLOTS[1]]["scores"]
    print(f"4M over 1M slots: gather + exchange + backward + update {flat_ratio:.2f}, scores {score_ratio:.2f}")
    return {
        "oracle_ms": oracle_ms,
        "engine_ms": engine_ms,
        "engine_over_oracle": ratio,
        "memory_ms": least,
        "flat_4m_over_1m": flat_ratio,
        "scores_4m_over_1m": score_ratio,
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    memory = on_ranks(2, time_memory, arguments.steps)
    figures = report(time_dense(arguments.steps), memory)
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
