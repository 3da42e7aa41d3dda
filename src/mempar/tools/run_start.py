"""What comes before ranks are started, whoever starts them: the run's directory, what it goes on from, its data."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.accept import open_checkpoint
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import parse_spec
from mempar.runtime.preflight import check_data
from mempar.runtime.run_dir import RunDir, check_free
from mempar.tools.missing_data import check_named_data

CORPORA = ("stdlib",)


def root_of(run: RunConfig, out: Path | None, *, resume: bool, start_from: Path | None) -> Path:
    """The run's directory; a fresh one under runs/ unless given.

    Raises:
        ConfigError: for options that exclude each other, or --resume without a directory.
    """
    if resume and start_from is not None:
        raise ConfigError("--resume and --from exclude each other: one continues a run, the other starts a new one.")
    if resume and out is None:
        raise ConfigError("--resume needs --out DIR, the directory of the run to continue.")
    return (out or Path("runs") / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()


def find_checkpoint(root: Path, run: RunConfig, *, resume: bool, start_from: Path | None) -> Manifest | None:
    """Find and check what to continue from; refuse a directory that is not there for this. Nothing is changed.

    Args:
        root: the run's directory.
        run: the run.
        resume: continue the run in it.
        start_from: checkpoint to start a new run from.

    Raises:
        ConfigError: when the directory holds something else, or the run cannot go on from the checkpoint.
    """
    directory = RunDir(root)
    if not resume or not directory.config.exists():
        check_free(root)
    load = directory.latest_checkpoint() if resume else start_from and start_from.resolve()
    return load and open_checkpoint(load, run)


def with_data(run: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """Return the run with its data on disk: a built-in corpus is made, or found made, for it.

    Raises:
        ConfigError: for data that are not there, with the commands that make them, or that do not fit the run.
    """
    # A name that is wrong is refused before a corpus is made.
    parse_spec(run.data.tokenizer)
    if run.data.corpus and not run.data.paths:
        run = _with_corpus(run, say)
    check_named_data(run)
    check_data(run)
    return run


def nothing_to_continue(root: Path) -> str:
    """What is said where --resume finds no run: a job that may be queued again is started with it from the first."""
    return f"{root} holds no run to continue: a new one begins there"


def _with_corpus(run: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """Make a built-in corpus, or find it made, and fill in the paths."""
    if run.data.corpus not in CORPORA:
        raise ConfigError(
            f"data.corpus={run.data.corpus} is not known; the built-in corpora are: {', '.join(CORPORA)}; "
            "use one of these, or data.paths."
        )
    from mempar.tools.stdlib_corpus import build

    corpus = build(Path(run.data.cache).expanduser() / run.data.corpus, say)
    data = dataclasses.replace(run.data, paths=(str(corpus.train_prefix),), heldout_paths=(str(corpus.heldout_prefix),))
    return dataclasses.replace(run, data=data)
