"""Time of a training step: plain torch, the engine, and the engine with tables of growing size.

    python benchmarks/engine.py [--steps 5] [--out benchmarks/results/engine-cpu.json]

Everything is measured in one run, sides alternating, and reported as ratios, because machines are
shared: the oracle (tests/oracle.py, a page of plain torch) against the engine without memory in one
process, and memory layers on two ranks with the table in row shards at 65 thousand, 1 million and 4
million slots. What must not depend on the number of slots (gather, exchange, backward, update) is
timed apart from what may (scores, with its square root). A step is 2048 tokens.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SLOTS = (256**2, 1024**2, 2048**2)
FLAT_PHASES = ("gather", "exchange", "backward", "update")


def make_run(num_subkeys: int) -> Any:
    """A run of eight blocks 256 wide; `num_subkeys=0` is the dense model."""
    from mempar.memory.config import MemoryConfig
    from mempar.runtime.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

    memory = MemoryConfig(enabled=False)
    if num_subkeys:
        memory = MemoryConfig(
            layers=(1, 3, 5), num_subkeys=num_subkeys, heads=4, top_k=16, key_dim=64, value_dim=64, column_tile=16
        )
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
    from mempar.runtime.data import Batch

    size, length = run.train.micro_batch_size, run.train.seq_length
    data = torch.randint(0, 257, (run.train.global_batch_size, length + 1), generator=torch.Generator().manual_seed(1))
    return [
        Batch(
            tokens=data[i : i + size, :-1].contiguous(),
            labels=data[i : i + size, 1:].contiguous(),
            loss_mask=torch.ones(size, length),
            position_ids=torch.arange(length).expand(size, -1),
            sample_ids=list(range(i, i + size)),
        )
        for i in range(dp_rank * size, len(data), dp * size)
    ]


class Stopwatch:
    """Sums the time spent in wrapped functions."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time every call of `owner.name` under a phase."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - started
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

    params = {
        logical.name: logical.param.detach().clone().requires_grad_()
        for logical in logical_parameters(model.chunks[0], tp=1, tp_rank=0)
    }
    settings = run.model
    config = oracle.OracleConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        num_query_groups=settings.query_groups,
        ffn_hidden_size=settings.ffn_hidden_size,
        rotary_base=settings.rotary_base,
        norm_epsilon=settings.norm_epsilon,
        tie_embeddings=settings.tie_embeddings,
        memory_layers=(),
        num_subkeys=1,
        heads=1,
        top_k=1,
    )
    batches = [(batch.tokens, batch.labels, batch.loss_mask) for batch in random_batches(run, 0, 1)]
    state, optim = oracle.AdamState(), oracle.OptimConfig(lr=1e-3)
    return lambda: oracle.step(params, state, batches, config, optim)


def time_dense(steps: int) -> dict[str, list[float]]:
    """Seconds of each step of the oracle and of the dense engine, alternating, in this process."""
    from mempar.runtime import bringup

    bringup.join_world()
    run = make_run(0)
    world, model, stepper = engine_stepper(run)
    batches = random_batches(run, 0, 1)
    plain = oracle_step(run, model)
    seconds: dict[str, list[float]] = {"oracle": [], "engine": []}
    for step in range(steps + 2):
        for name, function in (("oracle", plain), ("engine", lambda: stepper.train(batches, 1.0))):
            started = time.perf_counter()
            function()
            if step >= 2:
                seconds[name].append(time.perf_counter() - started)
    bringup.tear_down(world)
    dist.destroy_process_group()
    return seconds


def time_memory(steps: int) -> dict[int, list[dict[str, float]]]:
    """On one of two ranks: phases of each step for every table size."""
    import mempar.kernels.product_topk as product_topk
    from mempar.parallel.collectives import MemberGroup
    from mempar.runtime import bringup

    warnings.simplefilter("ignore")
    bringup.join_world()
    torch.set_num_threads(1)
    results = {}
    for slots in SLOTS:
        run = make_run(round(slots**0.5))
        world, model, stepper = engine_stepper(run)
        watch = Stopwatch()
        forward, backward = product_topk._ProductTopk.forward, product_topk._ProductTopk.backward
        exchange = MemberGroup.all_to_all
        watch.wrap(product_topk._ProductTopk, "forward", "scores")
        watch.wrap(product_topk._ProductTopk, "backward", "scores")
        watch.wrap(model.table, "gather", "gather")
        watch.wrap(model.table, "backward", "backward")
        watch.wrap(model.table, "take_gradient", "backward")
        watch.wrap(stepper.optimizers.table, "update", "update")
        for group in (world.groups.memory, world.groups.copies):
            watch.wrap(group, "all_to_all", "exchange")
        batches = random_batches(run, world.placement.grid.dp_rank(world.rank), 2)
        rows = []
        for step in range(steps + 2):
            dist.barrier()
            watch.seconds.clear()
            started = time.perf_counter()
            stepper.train(batches, 1.0)
            total = time.perf_counter() - started
            if step >= 2:
                rows.append({"step": total, **watch.seconds})
        results[slots] = rows
        product_topk._ProductTopk.forward, product_topk._ProductTopk.backward = (
            staticmethod(forward),
            staticmethod(backward),
        )
        MemberGroup.all_to_all = exchange
        bringup.tear_down(world)
        del world, model, stepper
    dist.destroy_process_group()
    return results


def two_ranks(steps: int) -> dict[int, list[dict[str, float]]]:
    """Run `time_memory` on two ranks; rank 0's results."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="bench"
    )
    return elastic_launch(config, time_memory)(steps)[0]


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


def describe_machine() -> dict[str, str]:
    """Hardware, versions, commit and date of a result."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    memory = two_ranks(arguments.steps)
    figures = report(time_dense(arguments.steps), memory)
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
