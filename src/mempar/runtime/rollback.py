"""What a run does about steps that went wrong: it names what diverged, and goes back if it was asked to.

`Watch` looks at every step between its reduction and its update. A step that is not finite is skipped
by the optimizers; here it is told which parameters and rows were to blame. A spike (see spikes.py) is
told too, and with `train.spike_action=rollback` the model, the optimizers, the table and the progress
return to the last checkpoint before the spike began, while the data goes on after the step that
spiked: the batches in between are left out. Checkpoints and metrics of the steps that were undone are
removed; checkpoints that stay are not changed, so a run resumed from one comes to the same spike, and
to the same rollback.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mempar.errors import MemparError
from mempar.runtime.bringup import World
from mempar.runtime.checkpoint.loading import load_checkpoint, open_together
from mempar.runtime.checkpoint.retention import checkpoints_in, discard, step_of
from mempar.runtime.config import RunConfig
from mempar.runtime.divergence import name_diverged, name_not_finite
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers, RowGradient, StepReport
from mempar.runtime.progress import Progress
from mempar.runtime.run_dir import RunDir
from mempar.runtime.spikes import Spike, find_spike


class Watch:
    """Judges the steps of one run on one rank; all ranks judge alike.

    Attributes:
        progress: of the run; a rollback restores it in place.
        spike: what the last step was found to be.
        named: phrases that name what went wrong in it, equal on all ranks.
    """

    def __init__(
        self, run: RunConfig, world: World, directory: RunDir, model: Model, optimizers: Optimizers, progress: Progress
    ) -> None:
        self.run, self.world, self.directory = run, world, directory
        self.model, self.optimizers, self.progress = model, optimizers, progress
        self.spike: Spike | None = None
        self.named: list[str] = []

    @property
    def needs_checkpoint(self) -> bool:
        """Whether there is nothing yet that a rollback could go back to; equal on all ranks."""
        if self.run.train.spike_action != "rollback":
            return False
        return self._agree(self.directory.latest_checkpoint()) is None

    @property
    def good_before(self) -> int:
        """The step before which a checkpoint must be kept, should the steps skipped last turn out to be a spike."""
        if self.run.train.spike_action != "rollback":
            return 0
        return self.progress.step + 1 - self.progress.skips_in_a_row

    def inspect(self, report: StepReport, gradients: dict[str, RowGradient]) -> None:
        """Judge a step before it is applied; an `Inspector`, called on every rank."""
        self.spike = find_spike(self.run.train, self.progress, report)
        self.named = []
        if not report.applied:
            self.named = name_not_finite(self.optimizers, gradients)
        elif self.spike is not None:
            self.named = name_diverged(self.optimizers, gradients)

    def roll_back(self) -> Path | None:
        """Go back to the last good checkpoint if the last step spiked and that is what to do; every rank must call it.

        Returns:
            The checkpoint; None when nothing was done.

        Raises:
            MemparError: when the run went back too often already, or there is no checkpoint before the spike.
        """
        spike, train = self.spike, self.run.train
        if spike is None or train.spike_action != "rollback":
            return None
        if self.progress.rollbacks >= train.spike_max_rollbacks:
            raise MemparError(
                f"{spike}{self.suspects}, after {self.progress.rollbacks} rollbacks; a run goes back at most "
                f"train.spike_max_rollbacks={train.spike_max_rollbacks} times; look at its data and learning rates, "
                "or raise that number and resume."
            )
        good = self._agree(self.directory.latest_checkpoint(before=spike.began))
        if good is None:
            raise MemparError(
                f"{spike}{self.suspects}; it began at step {spike.began}, and no checkpoint before that is left to go "
                f"back to; keep more than train.keep_checkpoints={train.keep_checkpoints}, or start again from an "
                "older one with --from."
            )
        manifest = open_together(good, self.run, self.world)
        load_checkpoint(manifest, self.world, self.model, self.optimizers)
        # Later ones go when the good one has been read by all.
        dist.barrier()
        if self.world.is_main:
            for later in checkpoints_in(self.directory.checkpoints):
                if step_of(later) > step_of(good):
                    # What cannot be deleted is written again when the run comes by.
                    with contextlib.suppress(OSError):
                        discard(later)
        dist.barrier()
        samples, rollbacks = self.progress.samples, self.progress.rollbacks + 1
        self.progress.restore(manifest.progress)
        self.progress.samples, self.progress.rollbacks = samples, rollbacks
        self.spike = None
        return good

    @property
    def suspects(self) -> str:
        """What is to blame, for a message: empty, or begins with a colon."""
        return f": {'; '.join(self.named)}" if self.named else ""

    def event(self, kind: str, spike: Spike) -> dict[str, Any]:
        """Describe a spike for metrics.jsonl, at the present step of the progress."""
        return {
            "step": self.progress.step,
            "event": kind,
            "spike_step": spike.step,
            "spike_began": spike.began,
            "spike_loss": spike.loss,
            "median_loss": spike.median,
            "skipped_in_a_row": spike.skips,
            "diverged": self.named,
        }

    def _agree(self, path: Path | None) -> Path | None:
        """Take the main rank's word for what lies on disk."""
        said: list[Any] = [path]
        dist.broadcast_object_list(said, src=0)
        return said[0]
