"""The training loop: from a laid-out world and a run's directory to a trained model on disk."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mempar.runtime.bringup import World
from mempar.runtime.checkpoint.accept import DATA
from mempar.runtime.checkpoint.keeper import Keeper
from mempar.runtime.checkpoint.loading import load_checkpoint, open_together
from mempar.runtime.checkpoint.manifest import HISTORY_SINCE, PASSED_ON
from mempar.runtime.checkpoint.together import on_main
from mempar.runtime.config import RunConfig
from mempar.runtime.copies import check_copies
from mempar.runtime.data.check import data_identity, identity_differences
from mempar.runtime.data.samples import Samples, micro_batches
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.heldout import Heldout
from mempar.runtime.launch.heartbeat import Heartbeat, Phase
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.layout_report import write_layout
from mempar.runtime.metrics import MetricsLog, Terminal, peak_flops
from mempar.runtime.model import build_model
from mempar.runtime.optim import Optimizers, StepReport
from mempar.runtime.profile.interval import IntervalProfile
from mempar.runtime.progress import Progress
from mempar.runtime.rollback import Watch
from mempar.runtime.run_dir import RunDir
from mempar.runtime.schedule import LrFactors, lr_factors
from mempar.runtime.size import model_size
from mempar.runtime.slot_recording import SlotRecorder
from mempar.runtime.step import Stepper
from mempar.runtime.usage import UsageMonitor, usage_lines


class Trainer:
    """One run on one rank.

    Attributes:
        after_step: called with the numbers of every step that stands, before it is saved; on every rank, so that it
            may compute with the model, and None unless somebody sets it.
    """

    def __init__(
        self,
        run: RunConfig,
        world: World,
        directory: RunDir,
        load: Path | None,
        stopping: Stopping | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Build the model and continue from a checkpoint, if there is one.

        Args:
            run: the run.
            world: the laid-out ranks.
            directory: where to write.
            load: checkpoint to continue from.
            stopping: what this rank is told about ending early.
            heartbeat: where it gives signs of life.
        """
        self.run, self.world, self.directory = run, world, directory
        self.stopping, self.heartbeat = stopping or Stopping(), heartbeat or Heartbeat()
        self.model = build_model(run, world, vocab_size(run))
        self.optimizers = Optimizers(run, world, self.model)
        self.stepper = Stepper(run, world, self.model, self.optimizers, self.stopping, self.heartbeat)
        self.progress = Progress()
        # An index may be long: one rank reads it.
        self.data = on_main(world, None, lambda said: data_identity(run))
        self.samples = Samples(run, run.data.paths, run.data.weights, run.train.seed)
        self.heldout = Heldout(run, world, self.stepper, self.model) if run.train.heldout_samples else None
        since: dict[str, int] = dict.fromkeys(run.memories, 0)
        self._passed_on: dict[str, Any] = {}
        if load is not None:
            manifest = open_together(load, run, world)
            load_checkpoint(manifest, world, self.model, self.optimizers)
            self.progress.restore(manifest.progress)
            self._passed_on = {key: manifest.about[key] for key in PASSED_ON if key in manifest.about}
            if load.parent != directory.checkpoints:
                self._begin_anew(manifest.about.get(DATA, {}))
            # A history that was not saved begins here.
            since = dict.fromkeys(run.memories, self.progress.step) | manifest.about.get(HISTORY_SINCE, {})
        self.usage = UsageMonitor(run, world, self.model, self.optimizers, since)
        self.profile = IntervalProfile(run.train.profile_interval, world, self.model)
        self.keeper = Keeper(run, world, directory, self.model, self.optimizers, self._say)
        self.stepper.ballots.add(self.keeper)
        self.watch = Watch(run, world, directory, self.model, self.optimizers, self.progress)
        self.recorder = SlotRecorder(self.stepper, self.model, directory.slots)
        write_layout(directory.layout, world, self.model, self.optimizers)
        self.after_step: Callable[[StepReport], None] | None = None
        self.terminal: Terminal | None = None
        self.log: MetricsLog | None = None
        if world.is_main:
            self.log = MetricsLog(directory.metrics, first_step=self.progress.step, rollbacks=self.progress.rollbacks)
            self.terminal = Terminal(
                total_steps=run.train.steps, first_step=self.progress.step, interval=run.train.log_interval
            )

    def _begin_anew(self, data_before: dict[str, Any]) -> None:
        """Keep of another run's progress what a new run goes on with."""
        # It has not gone back yet.
        self.progress.rollbacks = 0
        if identity_differences(data_before, self.data):
            # A position in other data.
            self.progress.samples = 0

    def train(self) -> None:
        """Run to the last step, saving and evaluating on the way; or until the ranks agree to stop."""
        train = self.run.train
        self._announce()
        if not self.stepper.agree_to_stop() and self.progress.step < train.steps:
            self._heldout(yardsticks=True)
            if self.watch.needs_checkpoint:
                self._save()
        while self.progress.step < train.steps and not self.stopping.agreed:
            with self.stopping.timed("step"):
                report = self._step()
            if self.keeper.all_written:
                self._finish_save()
            if self._went_back():
                continue
            if self.after_step is not None:
                self.after_step(report)
            step = self.progress.step
            last = step == train.steps
            saves = bool(train.save_interval and step % train.save_interval == 0) or last
            self.heartbeat.mark(Phase.COPY_CHECK, step)
            check_copies(self.run, self.model, self.optimizers, step, saving=saves or bool(self.stopping.agreed))
            if train.heldout_interval and step % train.heldout_interval == 0 and not last:
                with self.stopping.timed("evaluation"):
                    self._heldout()
            if saves or self.stopping.agreed:
                self._save()
        self._finish_save()
        self._heldout(yardsticks=True)
        self._close()

    def _save(self) -> None:
        """Save; who was told to stop while it went on need not wait for another step."""
        self.heartbeat.mark(Phase.SAVING, self.progress.step)
        with self.stopping.timed("save"):
            self.save()
        self.stepper.agree_to_stop()

    def _finish_save(self) -> None:
        """Name the checkpoint that was written beside training, if there is one."""
        if self.keeper.pending is not None:
            self.heartbeat.mark(Phase.SAVING, self.progress.step)
        saved = self.keeper.finish()
        if saved is not None:
            # Whoever stops has to wait for all of it, and for another one where one is in the making.
            self.stopping.took("save", saved.seconds * (2 if self.run.checkpoint.asynchronous else 1))

    def save(self) -> None:
        """Write a checkpoint of the present step and drop the oldest; every rank must call it."""
        meta = {"progress": self.progress.meta(), HISTORY_SINCE: self.usage.since, DATA: self.data, **self._passed_on}
        self.keeper.save(meta, self.watch.good_before)

    def _step(self) -> StepReport:
        train, grid, progress = self.run.train, self.world.placement.grid, self.progress
        started = time.monotonic()
        self.heartbeat.mark(Phase.DATA, progress.step + 1)
        batches = micro_batches(
            self.samples,
            self.run,
            progress.samples,
            count=train.global_batch_size,
            dp_rank=grid.dp_rank(self.world.rank),
            dp=grid.dp,
            device=self.world.device,
        )
        factors = lr_factors(self.run, progress.step)
        self.usage.watch(progress.step + 1)
        self.heartbeat.mark(Phase.FORWARD_BACKWARD, progress.step + 1)
        with self.recorder.recording(progress.step), self.profile.step(progress.step + 1):
            report = self.stepper.train(batches, factors, self.watch.inspect)
        progress.advance(
            applied=report.applied,
            loss=report.loss,
            tokens=report.tokens,
            samples=train.global_batch_size,
            window=train.spike_window if train.spike_factor else 0,
        )
        self.heartbeat.mark(Phase.UPDATE, progress.step)
        usage, profile = self.usage.report(progress.step), self.profile.report(progress.step)
        if self.world.is_main:
            self._record(report, factors, time.monotonic() - started, usage, profile)
        return report

    def _went_back(self) -> bool:
        """Tell of a spike and roll back if that is what to do; every rank must call it."""
        spike = self.watch.spike
        if spike is None:
            return False
        self._say(f"spike: {spike}{self.watch.suspects}")
        if self.log is not None:
            self.log.write(self.watch.event("spike", spike))
        self._finish_save()
        self.heartbeat.mark(Phase.SAVING, self.progress.step)
        good = self.watch.roll_back()
        if good is None:
            return False
        step, rollbacks = self.progress.step, self.progress.rollbacks
        self._say(f"rollback {rollbacks}: back to {good.name}, on with sample {self.progress.samples}")
        if self.log is not None:
            self.log.cut(step, rollbacks - 1)
            event = self.watch.event("rollback", spike)
            self.log.write({**event, "rollbacks": rollbacks, "next_sample": self.progress.samples})
        return True

    def _record(
        self,
        report: StepReport,
        factors: LrFactors,
        seconds: float,
        usage: dict[str, float],
        profile: dict[str, float],
    ) -> None:
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
        for name, memory in self.run.memories.items():
            row[f"{name}_grad_norm"] = report.memory_grad_norms[name]
            row[f"{name}_lr"] = factors.values[name] * self.run.values_lr_of(memory)
            if memory.balance_loss:
                row[f"{name}_balance_loss"] = report.balance_losses[name]
        if self.progress.skipped:
            row["skipped_steps"] = self.progress.skipped
        row.update(usage)
        row.update(profile)
        if not report.applied:
            row["not_finite"] = self.watch.named
            self._say(f"step {self.progress.step} is skipped: its loss or gradient is not finite{self.watch.suspects}")
        self.log.write(row)
        peak = peak_flops(self.run.train.peak_tflops)
        flops = model_size(self.run, vocab_size(self.run)).flops_per_token * row["tokens_per_s"]
        mfu = flops / (peak * self.world.size) if peak else None
        self.terminal.step(row, mfu=mfu, skipped=self.progress.skipped)
        for line in usage_lines(usage, self.run):
            self._say(line)

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
        if self.heldout is None or self.stopping.agreed:
            return
        self.heartbeat.mark(Phase.EVALUATION, self.progress.step)
        losses = {"heldout_loss": self.heldout.loss()}
        said = [f"this model {losses['heldout_loss']:.4f}"]
        if yardsticks and self.run.memory.enabled:
            losses["heldout_loss_memory_off"] = self.heldout.loss(memory=False)
            said.append(f"its memory switched off {losses['heldout_loss_memory_off']:.4f}")
        if yardsticks and self.run.data.trigram_baseline and self.world.is_main:
            losses["heldout_loss_trigram"] = self.heldout.trigram_loss
            said.append(f"trigram counts {losses['heldout_loss_trigram']:.4f}")
        if self.stopping.agreed:
            # It was cut short.
            return
        self._say(f"held-out loss after {self.progress.step} steps: {', '.join(said)}")
        if self.log is not None:
            self.log.write({"step": self.progress.step, **losses})

    def _close(self) -> None:
        self.heartbeat.mark(Phase.ENDING, self.progress.step)
        if self.stopping.agreed:
            whole = self.directory.checkpoint(self.progress.step).exists()
            saved = "saved" if whole else "with nothing new to save"
            more = "continue with --resume" if self.progress.step < self.run.train.steps else "all steps are done"
            self._say(f"ended by {self.stopping.agreed} at step {self.progress.step}, {saved}; {more}")
        if self.log is not None and self.terminal is not None:
            self.log.close()
            self.terminal.close()

    def _say(self, text: str) -> None:
        if self.terminal is not None:
            self.terminal.say(text)
