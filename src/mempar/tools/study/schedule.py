"""Runs as processes, some of them at a time, until all are done: what is done already is not done again.

Each run is a process of one thread with a directory of its own. Whatever ends the study, a run goes on from its newest
checkpoint when the study does. A run that fails keeps nobody else from running.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mempar.errors import MemparError
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.launch.heartbeat import read_signs
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.stopping import heed_signals
from mempar.runtime.overrides import load_yaml, to_yaml
from mempar.runtime.run_dir import RunDir, open_existing
from mempar.tools.study.directory import needs_room
from mempar.tools.study.one_run import ENTRANT, RESULT
from mempar.tools.study.variants import Entrant

_WORKER = "mempar.tools.study.one_run"
# Programs of one thread side by side: threads of a pool would wait for each other by spinning.
_ENVIRONMENT = ("OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=PASSIVE")
_LOG = "log"
_POLL_SECONDS = 0.5
# Models differ in speed: what remains is estimated from all that was seen.
_SPEED_WINDOW_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run to be done.

    Attributes:
        entrant: the model.
        run: its settings.
        root: directory of the run.
        corpus: directory of the facts.
        asked: facts to be asked for before the end.
        evaluation_interval: steps between evaluations.
    """

    entrant: Entrant
    run: RunConfig
    root: Path
    corpus: Path
    asked: int
    evaluation_interval: int

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return (self.root / RESULT).exists()

    @property
    def steps_done(self) -> int:
        """Of the run in hand, as it gives signs of life."""
        signs = read_signs(RunDir(self.root).ranks)
        return max(0, signs[-1].step - 1) if signs else 0

    def prepare(self) -> None:
        """Make its directory, or see that it holds this run.

        Raises:
            ConfigError: when it holds another one, or cannot be written.
        """
        with needs_room(self.root):
            self._prepare(RunDir(self.root))

    def _prepare(self, paths: RunDir) -> None:
        if paths.config.exists():
            # The study's own corpus, wherever it lies now: the study has made sure that it is the same.
            found = dataclasses.replace(load_yaml(paths.config), data=self.run.data)
            replace_file(paths.config, to_yaml(found).encode())
        open_existing(self.root, self.run)
        shutil.rmtree(paths.ranks, ignore_errors=True)
        entrant = {
            "variant": self.entrant.variant,
            "slots": self.entrant.slots,
            "corpus": str(self.corpus),
            "asked": self.asked,
            "evaluation_interval": self.evaluation_interval,
        }
        (self.root / ENTRANT).write_text(json.dumps(entrant) + "\n")

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with it; must be called in the main thread, with which the process ends."""
        with (self.root / _LOG).open("ab") as log:
            # A session of its own: ^C reaches the study alone, which passes it on.
            return subprocess.Popen(
                ["env", *_ENVIRONMENT, sys.executable, "-m", _WORKER, str(self.root), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def clear(self) -> None:
        """Delete what a run that is done does not need any more, its weights above all."""
        paths = RunDir(self.root)
        for path in (paths.checkpoints, paths.ranks):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob("events.out.tfevents*"):
            path.unlink(missing_ok=True)

    def failure(self) -> str:
        """The last line that it left in its log."""
        lines = (self.root / _LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a schedule ended.

    Attributes:
        stopped: the signal that ended it; empty when all runs were tried.
        failed: names of runs that failed, and what they said last.
    """

    stopped: str
    failed: dict[str, str]


def run_all(planned: Sequence[Planned], jobs: int, *, keep_models: bool, say: Callable[[str], None]) -> Ending:
    """Do all runs that are not done; must be called in the main thread.

    SIGTERM and SIGINT let running ones save and end; a second SIGINT ends them at once.

    Args:
        planned: all runs of the study, in order.
        jobs: at a time.
        keep_models: whether checkpoints stay.
        say: prints a line.

    Raises:
        ConfigError: when a run's directory holds another run, or another process writes there; nothing has been
            started then.
        KeyboardInterrupt: at the second SIGINT.
    """
    with ExitStack() as locks:
        schedule = _Schedule(planned, keep_models, say, locks)
        with heed_signals(schedule.stop), _showing(planned) as show:
            try:
                while schedule.goes_on(jobs):
                    show(schedule.running)
                    time.sleep(_POLL_SECONDS)
            finally:
                schedule.kill()
    return Ending(stopped=schedule.stopped, failed=schedule.failed)


class _Schedule:
    """Which runs wait, which are running, and which have failed."""

    def __init__(
        self, planned: Sequence[Planned], keep_models: bool, say: Callable[[str], None], locks: ExitStack
    ) -> None:
        self.waiting = [one for one in planned if not one.is_done]
        # All of them before any is started. A study that was killed may have left a run that still ends, and nobody
        # else is to go on with one until all have ended. Of a file system without locks the study's own lock tells.
        for one in self.waiting:
            locks.enter_context(RunLock(one.root, lambda said: None))
            one.prepare()
        self.running: dict[str, tuple[Planned, subprocess.Popen[bytes]]] = {}
        self.failed: dict[str, str] = {}
        self.stopped, self._told = "", False
        self._total, self._keep, self._say = len(planned), keep_models, say
        self._done = self._total - len(self.waiting)

    def stop(self, signal_name: str) -> None:
        """Note a signal, and nothing else: it comes between any two instructions; `goes_on` does what follows."""
        self.stopped = self.stopped or signal_name

    def goes_on(self, jobs: int) -> bool:
        """See who has ended and start others in their place; whether anything is left to wait for.

        After a signal nobody is started, and the running ones are told once to save and end.
        """
        for name, (one, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                self._ended(one, process.returncode)
        if self.stopped and not self._told:
            self._told = True
            for _, process in self.running.values():
                process.terminate()
        while self.waiting and len(self.running) < jobs and not self.stopped:
            one = self.waiting.pop(0)
            self.running[one.root.name] = (one, one.start())
        return bool(self.running)

    def _ended(self, one: Planned, status: int) -> None:
        if one.is_done:
            self._done += 1
            if not self._keep:
                one.clear()
            last = json.loads((one.root / RESULT).read_text())
            self._say(
                f"{self._done} of {self._total}: {one.root.name}, {last['accuracy']:.3f} recalled, "
                f"{last['seconds']:.0f} s"
            )
        elif not self.stopped:
            self.failed[one.root.name] = f"status {status}: {one.failure()}"
            self._say(f"{one.root.name} failed with status {status}; see {one.root / _LOG}")

    def kill(self) -> None:
        """End what is still running, at once."""
        for _, process in self.running.values():
            process.kill()
            process.wait()


@contextmanager
def _showing(
    planned: Sequence[Planned],
) -> Iterator[Callable[[dict[str, tuple[Planned, subprocess.Popen[bytes]]]], None]]:
    """Show progress where there is a terminal: a bar of all steps, and one of each run in hand."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("ends in"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=_SPEED_WINDOW_SECONDS,
    ) as bars:
        total = sum(one.run.train.steps for one in planned)
        whole = bars.add_task(f"{len(planned)} runs", total=total)
        tasks: dict[str, TaskID] = {}

        def show(running: dict[str, tuple[Planned, subprocess.Popen[bytes]]]) -> None:
            for name in [name for name in tasks if name not in running]:
                bars.remove_task(tasks.pop(name))
            steps = sum(one.run.train.steps for one in planned if one.is_done and one.root.name not in running)
            for name, (one, _) in running.items():
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=one.run.train.steps)
                bars.update(tasks[name], completed=one.steps_done)
                steps += one.steps_done
            bars.update(whole, completed=steps)

        yield show


def check_ending(ending: Ending) -> None:
    """Say which runs failed.

    Raises:
        MemparError: when any did.
    """
    if ending.failed:
        name, said = next(iter(ending.failed.items()))
        others = f" and {len(ending.failed) - 1} more" if len(ending.failed) > 1 else ""
        raise MemparError(
            f"{name}{others} failed ({said}); every run has to end well for a study to be whole; its log says more, "
            "and the same command tries again."
        )
