"""The checkpoints of a run: at most one in the making, the last few kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mempar.errors import MemparError
from mempar.runtime.bringup import World
from mempar.runtime.checkpoint.retention import checkpoints_in, prune
from mempar.runtime.checkpoint.saving import Save, Saved
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers
from mempar.runtime.run_dir import RunDir


class Keeper:
    """Saves one run on one rank; all ranks call its methods together.

    Attributes:
        all_written: whether the checkpoint in the making waits for nothing but to be finished, equal on all ranks.
    """

    def __init__(
        self,
        run: RunConfig,
        world: World,
        directory: RunDir,
        model: Model,
        optimizers: Optimizers,
        say: Callable[[str], None],
    ) -> None:
        """Take charge of a run's checkpoints.

        Args:
            run: the run.
            world: its ranks.
            directory: where its checkpoints lie.
            model: what is saved.
            optimizers: what is saved with it.
            say: prints a line, on the main rank.
        """
        self.run, self.world, self.directory = run, world, directory
        self.model, self.optimizers, self.say = model, optimizers, say
        self.pending: Save | None = None
        self.all_written = False
        self._good_before = 0

    def wishes(self) -> list[float]:
        """Say whether this rank has written its part of the checkpoint in the making; see ballots.py."""
        return [float(self.pending is not None and self.pending.has_written)]

    def settle(self, sums: list[float]) -> None:
        """Learn whether all ranks have."""
        self.all_written = sums == [float(self.world.size)]

    def save(self, meta: dict[str, Any], good_before: int) -> None:
        """Write a checkpoint, or begin to if saves are asynchronous; every rank must call it.

        Args:
            meta: see `Save`; its `progress` holds the step.
            good_before: the last checkpoint before this step is one that the run may have to go back to.

        Raises:
            MemparError: on every rank, when it cannot be written.
        """
        self.finish()
        step = meta["progress"]["step"]
        path = self.directory.checkpoint(step)
        self._good_before = good_before
        try:
            self.pending = Save(path, self.run, self.world, self.model, self.optimizers, meta)
        except MemparError as error:
            raise self._with_last_good(error) from None
        if not self.run.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> Saved | None:
        """Wait for the checkpoint in the making, name it and drop the oldest; every rank must call it.

        Returns:
            What was saved; None when nothing was in the making.

        Raises:
            MemparError: on every rank, when it could not be written.
        """
        if self.pending is None:
            return None
        pending, self.pending, self.all_written = self.pending, None, False
        try:
            saved = pending.finish()
        except MemparError as error:
            raise self._with_last_good(error) from None
        if self.world.is_main:
            try:
                prune(self.directory.checkpoints, self.run.train.keep_checkpoints, self._good_before)
            except OSError as error:
                self.say(f"warning: old checkpoints cannot be deleted ({error}); see to it before the disk is full")
            self.say(_announcement(saved, self.run.checkpoint.asynchronous))
        return saved

    def _with_last_good(self, error: MemparError) -> MemparError:
        whole = checkpoints_in(self.directory.checkpoints)
        return type(error)(
            f"{error} The last checkpoint is {_name(whole[-1])}." if whole else f"{error} There is none."
        )


def _announcement(saved: Saved, asynchronous: bool) -> str:
    size = f"{saved.num_bytes / 2**20:.1f} MiB in {saved.seconds:.1f} s"
    speed = f"{saved.num_bytes / 2**20 / max(saved.seconds, 1e-9):.0f} MiB/s"
    waited = f"; training waited for {saved.waited_seconds:.1f} s" if asynchronous else ""
    return f"saved {saved.path} ({size}, {speed}{waited})"


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
