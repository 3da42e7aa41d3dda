"""Carrying out a plan: checks before, jobs side by side, a journal of what is done, a name for the whole at the end.

    DST.partial     what is being made
    DST.journal     what of it is done
    DST             all of it

Whatever ends a conversion, DST is not there or it is whole, and `--resume` goes on behind the last job that was done.
"""

import contextlib
import os
import resource
import shutil
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mempar
from mempar.errors import ConfigError, MemparError
from mempar.runtime.checkpoint.manifest import FORMAT, checksum
from mempar.runtime.durable import sync
from mempar.tools.bars import byte_bars
from mempar.tools.convert.journal import Journal
from mempar.tools.convert.plan import Job, Plan

_PARTIAL, _JOURNAL = ".partial", ".journal"
# In the journal: all is done and described, and has its name, or is about to get it.
_NAMED = "(named)"
# Bytes that a conversion moves in a second, read and written together, for the estimate before it begins: a common
# NVMe disk's. The progress bar says what it really is.
_BYTES_PER_SECOND = 1e9


class ConversionError(MemparError):
    """A conversion that ended before it was done, through no fault of mempar's."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A plan, where its outcome belongs, and what it may use.

    Attributes:
        plan: what to do.
        identity: tells this conversion from others.
        source: the directory that is converted.
        destination: the directory to make.
        workers: jobs at a time, at most.
        max_memory: bytes that all of them together may take.
    """

    plan: Plan
    identity: str
    source: Path
    destination: Path
    workers: int
    max_memory: int

    @property
    def partial(self) -> Path:
        """Where it is made."""
        return self.destination.with_name(self.destination.name + _PARTIAL)

    @property
    def journal(self) -> Path:
        """Where is noted what of it is done."""
        return self.destination.with_name(self.destination.name + _JOURNAL)

    @property
    def job_memory_bytes(self) -> int:
        """That the largest job takes."""
        return max((job.memory_bytes for job in self.plan.jobs), default=0)

    @property
    def used_workers(self) -> int:
        """Jobs at a time that memory has room for.

        Raises:
            ConfigError: when it has none for the largest one.
        """
        fitting = self.max_memory // max(1, self.job_memory_bytes)
        if not fitting:
            raise ConfigError(
                f"--max-memory {_size(self.max_memory)} is too little: a row block of the source takes "
                f"{_size(self.job_memory_bytes)} to read, turn round and write; raise it to at least that."
            )
        return max(1, min(self.workers, fitting, len(self.plan.jobs)))

    def summary(self) -> list[tuple[str, str]]:
        """What the conversion will take, as names and texts."""
        read = sum(job.bytes_read for job in self.plan.jobs)
        written = sum(job.bytes_written for job in self.plan.jobs)
        workers = self.used_workers
        return [
            ("makes", self.plan.what),
            ("reads", _size(read)),
            ("writes", f"{_size(written)} in {len(self.plan.jobs)} jobs"),
            ("disk", f"{_size(_free(self.destination))} free where it is written"),
            ("memory", f"at most {_size(workers * self.job_memory_bytes)} for {workers} worker(s)"),
            ("time", f"about {_time((read + written) / _BYTES_PER_SECOND)} at 1 GB/s of reading and writing"),
        ]

    def run(self, *, resume: bool) -> None:
        """Do all of it that is not done yet.

        Args:
            resume: go on with what was begun.

        Raises:
            ConfigError: before anything is written: the destination exists, there is no room, something was begun.
            ConversionError: when a file cannot be read or written; what was done is kept.
            CheckpointError: when the source is damaged; what was done is kept.
        """
        try:
            self._check(resume)
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.journal, self.identity)
        except OSError as error:
            raise self._stopped(error) from None
        done = False
        try:
            if _NAMED not in journal.results or self.partial.exists() or not self.destination.exists():
                self._make(journal)
            done = True
        except OSError as error:
            raise self._stopped(error) from None
        finally:
            # Of what has not begun, nothing is left either.
            journal.close(remove=done or not (journal.results or self.partial.exists()))

    def _check(self, resume: bool) -> None:
        made, read = self.destination.resolve(), self.source.resolve()
        if read in (made, *made.parents, self.partial.resolve()) or self.partial.resolve() in read.parents:
            raise ConfigError(
                f"{self.destination} lies in {self.source}, or the other way round; a conversion reads the one and "
                "makes the other; choose another destination."
            )
        # A journal knows whether it only has not been tidied up.
        if os.path.lexists(self.destination) and not (resume and self.journal.exists()):
            raise self._taken(self.destination)
        if self.partial.exists() and not self.journal.exists():
            raise self._taken(self.partial)
        if not self.journal.exists():
            self._check_room(self.plan.jobs)
        begun = next((path for path in (self.journal, self.partial) if path.exists()), None)
        if begun is not None and not resume:
            raise ConfigError(
                f"{begun} exists: a conversion to {self.destination} was begun and did not end; continue it with "
                f"--resume, or remove {self.journal} and {self.partial}."
            )

    def _taken(self, path: Path) -> ConfigError:
        return ConfigError(
            f"{path} exists; a conversion makes a new directory and changes none; remove it, or choose another "
            "destination."
        )

    def _check_room(self, left: list[Job]) -> None:
        needed, free = sum(job.bytes_written for job in left), _free(self.destination)
        if needed > free:
            raise ConfigError(
                f"{self.destination} needs {_size(needed)} more and its disk has {_size(free)} left; make room, or "
                "choose another destination."
            )

    def _make(self, journal: Journal) -> None:
        if os.path.lexists(self.destination):
            raise self._taken(self.destination)
        if journal.results and not self.partial.is_dir():
            raise ConfigError(
                f"{self.partial} is gone, of which {self.journal} says what is done; --resume goes on with both; "
                "remove the journal, and begin anew."
            )
        left = [job for job in self.plan.jobs if job.key not in journal.results]
        self._check_room(left)
        self.partial.mkdir(exist_ok=True)
        self.plan.prepare(self.partial)
        self._work(left, journal)
        self.plan.finish(self.partial, {job.key: journal.results[job.key] for job in self.plan.jobs})
        sync(self.partial)
        journal.add(_NAMED, None)
        os.rename(self.partial, self.destination)
        sync(self.destination.parent)

    def _work(self, left: list[Job], journal: Journal) -> None:
        total = sum(job.bytes_written for job in self.plan.jobs)
        with byte_bars() as begin:
            advance = begin(self.destination.name, total, total - sum(job.bytes_written for job in left))
            _allow_files()
            ended = threading.Event()

            def work(job: Job) -> Any:
                if ended.is_set():
                    return None
                return job.run(self.partial, advance)

            with ThreadPoolExecutor(self.used_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                running: dict[Future[Any], Job] = {}
                try:
                    for job in left:
                        if len(running) == self.used_workers:
                            _note(running, journal)
                        running[pool.submit(work, job)] = job
                    while running:
                        _note(running, journal)
                finally:
                    ended.set()

    def _stopped(self, error: OSError) -> ConversionError:
        begun = False
        with contextlib.suppress(OSError):
            begun = self.journal.exists()
        return ConversionError(
            f"{self.destination} cannot be made: {error}; the source and everything that was there are as they were; "
            + (f"see to the disk, and continue {self.partial} with --resume." if begun else "see to the disk.")
        )


def _allow_files() -> None:
    """Let this process open as many files as it may: a job has one or two open for each rank that it writes for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def identity_of(*parts: str) -> str:
    """One text for everything that decides what a conversion makes, this version of mempar among it."""
    return checksum("\0".join((mempar.__version__, str(FORMAT), *parts)).encode())


def _note(running: dict[Future[Any], Job], journal: Journal) -> None:
    """Wait until a job has ended, and note those that have."""
    ended, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in ended:
        job = running.pop(future)
        journal.add(job.key, future.result())


def _free(path: Path) -> int:
    """Bytes left on the disk of a path that need not be there yet."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return shutil.disk_usage(there).free


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
