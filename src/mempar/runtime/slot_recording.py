"""Recording which slots a run's memory layers choose, for `mempar plan --simulate --replay` and for comparisons.

`train.trace_steps=N` records the first N training steps of a launch; held-out batches are not recorded. Ranks write
what they saw after each step, to `slots/from_FIRSTSTEP/` in the run's directory (slot_file.py has the format);
tensor-parallel ranks that hold the same tokens write them once. A step's choices are 4 bytes a read, in host memory
until they are written.

A launch begins a set of its own. What launches recorded from this step on or later ones is removed: the run went back
behind it. A rank that cannot write says so and records no more: training goes on.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mempar.runtime.model import Model
from mempar.runtime.slot_file import SET_NAME, save_slots, set_name
from mempar.runtime.slot_trace import SlotTracer
from mempar.runtime.step import Stepper


class SlotRecorder:
    """Records the first steps of a launch on one rank."""

    def __init__(self, stepper: Stepper, model: Model, folder: Path) -> None:
        """Stand by.

        Args:
            stepper: runs the steps.
            model: whose memory layers are watched.
            folder: where sets lie.
        """
        self._model, self._folder = model, folder
        world = stepper.world
        self._rank = world.rank
        tp_rank = world.placement.grid.tp_rank(world.rank)
        writes = bool(model.access) and (stepper.run.parallel.sequence_parallel or tp_rank == 0)
        self._left = stepper.run.train.trace_steps if writes else 0
        self._makes_room = world.is_main and bool(stepper.run.train.trace_steps)
        self._tracer = SlotTracer.for_run(stepper, tp_rank)
        self._set: Path | None = None

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Record a training step, if it is one of the first, and write it.

        Args:
            step: its number, from 0.
        """
        if self._set is None:
            self._set = self._folder / set_name(step)
            if self._makes_room:
                # Before the others write: they end no step without this rank.
                self._tolerantly(self._make_room)
        if not self._left:
            yield
            return
        self._tracer.step = step
        self._model.hook_slots(self._tracer)
        try:
            yield
        finally:
            self._model.hook_slots(None)
        self._left -= 1
        self._tolerantly(self._write)
        self._tracer.recorded.slots = {}

    def _make_room(self) -> None:
        """Remove the sets that begin at this step or behind it."""
        assert self._set is not None
        for path in list(self._folder.glob("from_*")):
            if SET_NAME.fullmatch(path.name) and path.name >= self._set.name:
                shutil.rmtree(path)

    def _write(self) -> None:
        assert self._set is not None
        if slots := self._tracer.recorded.slots:
            self._set.mkdir(parents=True, exist_ok=True)
            save_slots(self._set / f"step_{self._tracer.step:08d}_rank_{self._rank:05d}.npz", slots)

    def _tolerantly(self, act: Callable[[], None]) -> None:
        """Do something on disk; where that cannot be done, say so and record no more."""
        try:
            act()
        except OSError as error:
            self._left = 0
            print(
                f"mempar: rank {self._rank} records no more slots: {error.filename or self._set} cannot be written "
                f"({error.strerror}); training goes on.",
                file=sys.stderr,
                flush=True,
            )
