"""What is to be evaluated, and what was found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.named_path import is_directory, status_of
from mempar.tools.evaluate.heldout import Loss


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated; attributes are the options of `mempar eval` (options.py)."""

    checkpoint: Path
    tasks: tuple[str, ...] = ()
    task_dir: tuple[Path, ...] = ()
    data: tuple[str, ...] = ()
    samples: int | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    nproc: int = 1
    tables: str = "auto"
    allow_code: bool = False
    seed: int = 1234
    out: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be done, whatever the checkpoint.

        Raises:
            ConfigError: for options that are none, or do not go together.
        """
        if not self.tasks and not self.data:
            raise ConfigError(
                "nothing to evaluate: --tasks A,B or --data PREFIX is needed; `--tasks published` is the paper's nine."
            )
        for name, number, least in (
            ("--samples", self.samples, 1),
            ("--batch-size", self.batch_size, 1),
            ("--nproc", self.nproc, 1),
            ("--num-fewshot", self.num_fewshot, 0),
        ):
            if number is not None and number < least:
                raise ConfigError(f"{name} {number} must be at least {least}; raise it.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed} is not a number from 0 to 2^32 - 1, as the harness takes; use one.")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise ConfigError(
                f"--limit {self.limit:g} is neither a number of questions nor a share of them below 1; use one of "
                "these."
            )
        if self.samples is not None and not self.data:
            raise ConfigError("--samples without --data: it bounds the windows of data; --limit bounds the questions.")
        alone = {"--task-dir": self.task_dir, "--limit": self.limit, "--num-fewshot": self.num_fewshot is not None}
        given = [name for name, value in (alone | {"--allow-code": self.allow_code}).items() if value]
        if given and not self.tasks:
            raise ConfigError(f"{', '.join(given)} without --tasks: that is about tasks; name some, or drop it.")
        if self.out is not None:
            _check_out(self.out)


def _check_out(path: Path) -> None:
    if status_of(path, "--out") is not None:
        raise ConfigError(f"--out {path} exists; nothing is overwritten; delete it, or choose another name.")
    # Written beside it first, under a longer name.
    status_of(f"{path}.aside", "--out")
    if not is_directory(path.absolute().parent, "--out"):
        raise ConfigError(f"--out {path} lies in no directory; a file is made, directories are not; make it first.")


@dataclass(kw_only=True)
class Results:
    """What was found.

    Attributes:
        checkpoint: that was evaluated.
        manifest: of it.
        run: that wrote it.
        asked: tasks and groups, by the names that were asked for.
        tasks: the harness's results; None where no task was asked for.
        losses: on data.
        notes: what was done otherwise than asked, and why.
    """

    checkpoint: Path
    manifest: Manifest
    run: RunConfig
    asked: list[str] = field(default_factory=list)
    tasks: dict[str, Any] | None = None
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
