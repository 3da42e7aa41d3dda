"""What a run says while it runs: metrics.jsonl, TensorBoard, a line on the terminal.

Only the main rank writes. Numbers in metrics.jsonl keep full precision, and one that is not finite is
null; a held-out loss is `heldout_loss`, never `loss`. A row with `event` says what happened at a step.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mempar.errors import MemparError
from mempar.runtime.hardware import GPUS


class MetricsLog:
    """Writes the numbers of a run."""

    def __init__(self, path: Path, *, first_step: int, rollbacks: int = 0) -> None:
        """Open the log of a run.

        Args:
            path: metrics.jsonl; rows of steps after `first_step` are cut off.
            first_step: steps done so far.
            rollbacks: rollbacks so far; the events of later ones, which a resumed run comes to again, are cut off.
        """
        self._path = path
        self._open(first_step, rollbacks)

    def cut(self, step: int, rollbacks: int) -> None:
        """Forget the steps after `step`, and events of rollbacks after the first `rollbacks`."""
        self.close()
        self._open(step, rollbacks)

    def _open(self, step: int, rollbacks: int) -> None:
        path = self._path
        kept = read_rows(path) if path.exists() else []
        kept = [row for row in kept if row["step"] <= step and row.get("rollbacks", 0) <= rollbacks]
        # Rewritten aside, so that a crash here loses nothing.
        fresh = path.with_suffix(".partial")
        with _writing(path):
            fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
            fresh.replace(path)
            self._file = path.open("a", buffering=1)
        # tensorboard's import costs a second: only the rank that writes pays it.
        from torch.utils.tensorboard import SummaryWriter

        with _writing(self._events):
            self._board = SummaryWriter(str(path.parent), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object; it has a `step`.

        Raises:
            MemparError: when it cannot be written; what TensorBoard could not write may come to light steps later.
        """
        # JSON has no infinities and no NaN.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with _writing(self._path):
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        with _writing(self._events):
            for name, value in finite.items():
                if name != "step" and isinstance(value, int | float) and "event" not in row:
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close.

        Raises:
            MemparError: when what is left to be written cannot be.
        """
        with _writing(self._path):
            self._file.close()
        with _writing(self._events):
            self._board.close()

    @property
    def _events(self) -> Path:
        """TensorBoard's files, for messages; it names them itself."""
        return self._path.parent / "events.out.tfevents*"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write a file into the message about it."""
    try:
        yield
    except OSError as error:
        raise MemparError(
            f"{path} cannot be written ({error.strerror or error}); a run writes its numbers there at every step; make "
            "room or see to the disk, and continue with --resume."
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a crash cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Terminal:
    """Progress for people: a bar where there is a terminal, and a line every few steps."""

    def __init__(self, *, total_steps: int, first_step: int, interval: int) -> None:
        self.console = Console(soft_wrap=True)
        self.interval = interval
        self.total_steps = total_steps
        self._bar: Progress | None = None
        if sys.stdout.isatty() and total_steps > first_step:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, emoji=False)

    def step(self, row: dict[str, Any], *, mfu: float | None, skipped: int) -> None:
        """Show one step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"])
        if row["step"] % self.interval and row["step"] != self.total_steps:
            return
        parts = [
            f"step {row['step']:>6}/{self.total_steps}",
            f"loss {row['loss']:.4f}",
            f"grad {row['grad_norm']:.3f}",
        ]
        if "memory_grad_norm" in row:
            parts.append(f"memory grad {row['memory_grad_norm']:.4f}")
        parts += [f"lr {row['lr']:.2e}", f"{_thousands(row['tokens_per_s'])} tokens/s"]
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        parts.append(f"{memory_bytes() / 2**30:.2f} GiB")
        if skipped:
            parts.append(f"skipped {skipped}")
        self.say(" | ".join(parts))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def memory_bytes() -> int:
    """Bytes in use by this rank: peak device memory, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def peak_flops(configured_tflops: float) -> float | None:
    """Peak FLOP/s of this rank's device, where known or configured."""
    if configured_tflops:
        return configured_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for gpu in GPUS.values():
            if gpu.label in name:
                return gpu.bf16_tflops * 1e12
    return None


def _thousands(number: float) -> str:
    return f"{number / 1e3:.1f}k" if number < 1e6 else f"{number / 1e6:.2f}M"
