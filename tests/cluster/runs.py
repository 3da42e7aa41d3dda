"""A small run in float64 whose losses are compared: the same numbers on one process and across nodes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MEMPAR = [sys.executable, "-c", "from mempar.cli import main; main()"]
STEPS = 200
# Long enough to act in its midst, small enough for two cores.
SETTINGS = [
    "train.dtype=float64",
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "train.seq_length=64",
    "train.save_interval=10",
    "train.log_interval=5",
    "train.heldout_samples=0",
    "train.collective_timeout=20",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "memory.layers=[0,1]",
    "memory.num_subkeys=32",
    "memory.key_dim=32",
    "memory.usage_interval=0",
    "data.trigram_baseline=false",
]
# The table in two row shards, one on each node.
ACROSS = ["parallel.mp=2", "parallel.mp_rows=2"]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as far as the run has come."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def step_of(run: Path) -> int:
    """The last step that a run has made."""
    try:
        return max(losses(run), default=0)
    except OSError:
        return 0


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]", seconds: float = 300.0) -> None:
    """Wait until a run has come to a step."""
    wait_until(lambda: step_of(run) >= step or process.poll() is not None, seconds)
    assert process.poll() is None, process.communicate()[0]
    assert step_of(run) >= step


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something to come to pass; whether it did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def train_alone(out: Path, settings: Sequence[str] = ()) -> dict[int, tuple[float, float]]:
    """The same run on one process of this machine."""
    command = [*MEMPAR, "train", "smoke", *SETTINGS, *settings, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    return losses(out)


def check_same(run: Path, alone: dict[int, tuple[float, float]], steps: int = STEPS) -> None:
    """Hold a run against the single process, as the layout law does."""
    found = losses(run)
    assert list(found) == list(range(1, steps + 1))
    for step, (loss, norm) in found.items():
        assert math.isclose(loss, alone[step][0], rel_tol=1e-9), step
        assert math.isclose(norm, alone[step][1], rel_tol=1e-6), step


def tell(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Send a signal to a launcher."""
    os.kill(process.pid, number)
