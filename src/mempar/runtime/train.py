"""The training loop: from a laid-out world and a run's directory to a trained model on disk."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.runtime import checkpoint
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.data import Samples, micro_batches
from mempar.runtime.heldout import Heldout
from mempar.runtime.layout_report import write_layout
from mempar.runtime.metrics import MetricsLog, Terminal, peak_flops
from mempar.runtime.model import build_model
from mempar.runtime.optim import Optimizers, StepReport
from mempar.runtime.run_dir import RunDir, read_meta
from mempar.runtime.schedule import LrFactors, lr_factors
from mempar.runtime.size import model_size
from mempar.runtime.step import Stepper
from mempar.runtime.tokenizer import vocab_size


@dataclass(kw_only=True)
class Progress:
    """What changes from step to step and is saved with a checkpoint.

    Attributes:
        step: steps done, applied or skipped; the data position is `step * global_batch_size` samples.
        applied_steps: optimizer updates applied.
        tokens: unmasked tokens seen.
    """

    step: int = 0
    applied_steps: int = 0
    tokens: int = 0

    @property
    def skipped(self) -> int:
        """Steps that were not finite."""
        return self.step - self.applied_steps


class Trainer:
    """One run on one rank."""

    def __init__(self, run: RunConfig, world: World, directory: RunDir, load: Path | None) -> None:
        """Build the model and continue from a checkpoint, if there is one.

        Args:
            run: the run.
            world: the laid-out ranks.
            directory: where to write.
            load: checkpoint to continue from.
        """
        self.run, self.world, self.directory = run, world, directory
        self.model = build_model(run, world, vocab_size(run))
        self.optimizers = Optimizers(run, world, self.model)
        self.stepper = Stepper(run, world, self.model, self.optimizers)
        self.progress = Progress()
        self.samples = Samples(run, run.data.paths, run.data.weights, run.train.seed)
        self.heldout = Heldout(run, world, self.stepper, self.model) if run.train.heldout_samples else None
        if load is not None:
            meta = read_meta(load, run)
            checkpoint.load(load, world, self.model, self.optimizers, meta)
            self.progress = Progress(**{name: meta[name] for name in ("step", "applied_steps", "tokens")})
        write_layout(directory.layout, world, self.model, self.optimizers)
        self.terminal: Terminal | None = None
        self.log: MetricsLog | None = None
        if world.is_main:
            self.log = MetricsLog(directory.metrics, first_step=self.progress.step)
            self.terminal = Terminal(
                total_steps=run.train.steps, first_step=self.progress.step, interval=run.train.log_interval
            )

    def train(self) -> None:
        """Run to the last step, saving and evaluating on the way."""
        train = self.run.train
        self._announce()
        if self.progress.step < train.steps:
            self._heldout(yardsticks=True)
        while self.progress.step < train.steps:
            self._step()
            step = self.progress.step
            last = step == train.steps
            if train.heldout_interval and step % train.heldout_interval == 0 and not last:
                self._heldout()
            if (train.save_interval and step % train.save_interval == 0) or last:
                self.save()
        self._heldout(yardsticks=True)
        self._close()

    def save(self) -> None:
        """Write a checkpoint of the present step and drop the oldest; every rank must call it."""
        path = self.directory.checkpoint(self.progress.step)
        started = time.monotonic()
        meta = {**vars(self.progress), "samples": self.progress.step * self.run.train.global_batch_size}
        checkpoint.save(path, self.run, self.world, self.model, self.optimizers, meta)
        if self.world.is_main:
            checkpoint.prune(self.directory.checkpoints, self.run.train.keep_checkpoints)
            seconds = time.monotonic() - started
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            self._say(f"saved {path} ({num_bytes / 2**20:.1f} MiB in {seconds:.1f} s)")

    def _step(self) -> None:
        train, grid, progress = self.run.train, self.world.placement.grid, self.progress
        started = time.monotonic()
        batches = micro_batches(
            self.samples,
            self.run,
            progress.step * train.global_batch_size,
            count=train.global_batch_size,
            dp_rank=grid.dp_rank(self.world.rank),
            dp=grid.dp,
            device=self.world.device,
        )
        factors = lr_factors(self.run, progress.step)
        report = self.stepper.train(batches, factors)
        progress.step += 1
        progress.applied_steps += report.applied
        progress.tokens += report.tokens
        if self.world.is_main:
            self._record(report, factors, time.monotonic() - started)

    def _record(self, report: StepReport, factors: LrFactors, seconds: float) -> None:
        assert self.log is not None and self.terminal is not None
        row: dict[str, Any] = {
            "step": self.progress.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": factors.dense * self.run.optim.lr,
            "tokens": self.progress.tokens,
            "seconds": seconds,
            "tokens_per_s": report.tokens / seconds,
        }
        if self.run.memory.enabled:
            row["memory_grad_norm"] = report.memory_grad_norm
            row["memory_lr"] = factors.values * self.run.values_lr
        if self.progress.skipped:
            row["skipped_steps"] = self.progress.skipped
        self.log.write(row)
        peak = peak_flops(self.run.train.peak_tflops)
        flops = model_size(self.run, vocab_size(self.run)).flops_per_token * row["tokens_per_s"]
        mfu = flops / (peak * self.world.size) if peak else None
        self.terminal.step(row, mfu=mfu, skipped=self.progress.skipped)

    def _announce(self) -> None:
        size = model_size(self.run, vocab_size(self.run))
        self._say(
            f"{self.run.name}: {size.total_params / 1e6:.2f}M parameters, of them {size.memory_params / 1e6:.2f}M in "
            f"the table; {size.active_params / 1e6:.2f}M active, {size.flops_per_token / 1e6:.1f} MFLOP a token"
        )
        self._say(f"{self.world.size} rank(s) on {self.world.device.type}, {self.world.placement.reason}")
        if self.progress.step >= self.run.train.steps:
            self._say(f"nothing to do: {self.progress.step} of {self.run.train.steps} steps are done")

    def _heldout(self, *, yardsticks: bool = False) -> None:
        """Evaluate and say so; with the losses of trigram counts and without the memory beside it."""
        if self.heldout is None:
            return
        losses = {"heldout_loss": self.heldout.loss()}
        said = [f"this model {losses['heldout_loss']:.4f}"]
        if yardsticks and self.run.memory.enabled:
            losses["heldout_loss_memory_off"] = self.heldout.loss(memory=False)
            said.append(f"its memory switched off {losses['heldout_loss_memory_off']:.4f}")
        if yardsticks and self.run.data.trigram_baseline and self.world.is_main:
            losses["heldout_loss_trigram"] = self.heldout.trigram_loss
            said.append(f"trigram counts {losses['heldout_loss_trigram']:.4f}")
        self._say(f"held-out loss after {self.progress.step} steps: {', '.join(said)}")
        if self.log is not None:
            self.log.write({"step": self.progress.step, **losses})

    def _close(self) -> None:
        if self.log is not None and self.terminal is not None:
            self.log.close()
            self.terminal.close()

    def _say(self, text: str) -> None:
        if self.terminal is not None:
            self.terminal.say(text)
