"""A bf16 table against a float32 one on the smoke recipe: stochastic rounding follows, the nearest stalls.

    python benchmarks/bf16_table.py --out benchmarks/results/bf16-table.json [--steps 300] [--lr 1e-4]
    python benchmarks/bf16_table.py --plot benchmarks/results/bf16-table.json docs/bf16-table.png

The second command needs the extra `docs` (matplotlib). Same seed, data and float32 training; only the
table differs: float32, bf16 rounded stochastically, bf16 rounded to the nearest.

Two things decide whether the comparison says anything. The rate: smoke's values start as normal(0, 1/16),
where bf16 numbers are 2.4e-4 or 4.9e-4 apart, and its own rate of 1e-2 moves a value by many of these a
step, so that any rounding works. Large models sit at the other end (values near 1/64, a rate that has
decayed to 1e-5: a tenth of a bf16 step); so does 1e-4 here, the default, held constant after the warm-up.
And what the table is needed for: beside dense parameters that learn at 3e-3, a table that moves this slowly
is worth less than 1% of the loss in 300 steps, stalled or not (measured at 3e-4: table frozen 1.5955, float32
1.5895). So by default the dense parameters stand still (`--dense-lr 0`) and the table alone has to learn.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

TABLES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16, stochastic": ("memory.dtype=bf16", "memory.rounding=stochastic"),
    "bf16, nearest": ("memory.dtype=bf16", "memory.rounding=nearest"),
}
INTERVAL = 10
SMOOTH = 20


def train(assignments: list[str], directory: Path) -> dict[str, Any]:
    """Train one run in this process; its losses, and how far its table has moved from its start."""
    from mempar.recipes import find_recipe
    from mempar.runtime import bringup
    from mempar.runtime.metrics import read_rows
    from mempar.runtime.overrides import override
    from mempar.runtime.preflight import check_layout
    from mempar.runtime.run_dir import open_new
    from mempar.runtime.train import Trainer
    from mempar.tools.train_command import with_data

    run = with_data(check_layout(override(find_recipe("smoke"), assignments), 1), print)
    world = bringup.lay_out(run)
    paths = open_new(directory, run)

    class Watching(Trainer):
        def _step(self) -> None:
            table = self.model.tables[0].shard
            if self.progress.step == 0:
                self.start, self.moved = table.values.float().clone(), [0.0]
            super()._step()
            if self.progress.step % INTERVAL == 0:
                self.moved.append(float((table.values.float() - self.start).norm() / self.start.norm()))

    trainer = Watching(run, world, paths, None)
    trainer.train()
    bringup.tear_down(world)
    rows = read_rows(paths.metrics)
    return {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "heldout_loss": [row["heldout_loss"] for row in rows if "heldout_loss" in row][-1],
        "table_moved": trainer.moved,
    }


def measure(steps: int, lr: float, dense_lr: float, out: Path | None) -> dict[str, Any]:
    """All runs, one after the other; what is measured so far is written after each."""
    from mempar.runtime import bringup

    bringup.join_world()
    shared = [f"train.steps={steps}", f"memory.lr={lr}", "memory.schedule=constant"]
    shared += ["optim.min_lr=0", f"optim.lr={dense_lr}"]
    runs: dict[str, Any] = {}
    figures = {**describe_machine(), "steps": steps, "lr": lr, "dense_lr": dense_lr, "runs": runs}
    for name, own in TABLES.items():
        with tempfile.TemporaryDirectory() as directory:
            print(f"--- {name}")
            runs[name] = train([*shared, *own], Path(directory) / "run")
        if out is not None:
            out.write_text(json.dumps(figures, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return figures


def smoothed(losses: list[float]) -> list[float]:
    """Mean of the last steps at every step."""
    windows = (losses[max(0, end - SMOOTH) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


def report(figures: dict[str, Any]) -> None:
    """Print each table beside the float32 one."""
    truth = figures["runs"]["float32"]
    print(f"{'table':>18} {'loss':>8} {'over f32':>9} {'held out':>9} {'over f32':>9} {'moved':>7}")
    for name, run in figures["runs"].items():
        loss, expected = smoothed(run["loss"])[-1], smoothed(truth["loss"])[-1]
        heldout = run["heldout_loss"]
        print(
            f"{name:>18} {loss:8.4f} {loss / expected - 1:9.2%} {heldout:9.4f} "
            f"{heldout / truth['heldout_loss'] - 1:9.2%} {run['table_moved'][-1]:7.3f}"
        )


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw the losses, how they differ from the float32 table's, and how far the tables moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (losses, differences, moves) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    truth = smoothed(figures["runs"]["float32"]["loss"])
    for name, run in figures["runs"].items():
        line = smoothed(run["loss"])
        losses.plot(line, label=name)
        differences.plot([100 * (own / other - 1) for own, other in zip(line, truth, strict=True)], label=name)
        moves.plot([INTERVAL * i for i in range(len(run["table_moved"]))], run["table_moved"], label=name)
    differences.axhspan(-1, 1, color="0.92")
    losses.set(title=f"training loss, mean of {SMOOTH} steps", xlabel="step", ylabel="nats a byte")
    differences.set(title="loss over that of the float32 table", xlabel="step", ylabel="%")
    moves.set(title="distance of the table from its start", xlabel="step", ylabel="share of its norm")
    losses.legend()
    drawing.suptitle(
        f"smoke, table learning rate {figures['lr']:g}, of the rest {figures['dense_lr']:g}; float32 training"
    )
    drawing.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the table")
    parser.add_argument("--dense-lr", type=float, default=0.0, help="of everything else; smoke has 3e-3")
    parser.add_argument("--out", type=Path, help="measure, and write the figures as JSON")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw figures that were written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.plot:
        plot(json.loads(arguments.plot[0].read_text()), arguments.plot[1])
        return
    report(measure(arguments.steps, arguments.lr, arguments.dense_lr, arguments.out))


if __name__ == "__main__":
    main()
