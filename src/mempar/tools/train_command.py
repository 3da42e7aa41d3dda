"""`mempar train`: resolve a recipe, check everything that can be checked, and start the ranks."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.checkpoint.accept import check_same_data, open_checkpoint
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.launch.local import launch_local
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.overrides import override
from mempar.runtime.preflight import check_data, check_layout
from mempar.runtime.run_dir import RunDir, check_free, open_existing, open_new
from mempar.tools.missing_data import check_named_data

CORPORA = ("stdlib",)


def train(
    recipe: str,
    assignments: list[str],
    *,
    num_ranks: int | None,
    out: Path | None,
    resume: bool,
    start_from: Path | None,
    say: Callable[[str], None],
) -> Path:
    """Train a recipe on this machine; SIGTERM and SIGINT let it save and return.

    Args:
        recipe: name, YAML file or module:function.
        assignments: `KEY=VALUE` overrides.
        num_ranks: processes; None takes the fewest that the layout can run on.
        out: the run's directory; None makes a fresh one under runs/.
        resume: continue the run in `out`.
        start_from: checkpoint to start a new run from.
        say: prints a line.

    Returns:
        The run's directory.

    Raises:
        ConfigError: for bad input, before anything is written or started.
        MemparError: when a rank failed.
    """
    launched = time.time()
    run = override(find_recipe(recipe), assignments)
    ranks = num_ranks if num_ranks is not None else run.parallel.smallest_world
    run = check_layout(run, ranks)
    if resume and start_from is not None:
        raise ConfigError("--resume and --from exclude each other: one continues a run, the other starts a new one.")
    if resume and out is None:
        raise ConfigError("--resume needs --out DIR, the directory of the run to continue.")
    root = (out or Path("runs") / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    ended = False
    try:
        with sigterm_raises():
            load = _checkpoint(root, run, resume=resume, start_from=start_from)
            run = with_data(run, say)
            if resume and load is not None:
                check_same_data(load, run)
            with RunLock(root, say):
                directory = open_existing(root, run) if resume else open_new(root, run)
                if resume:
                    # Whoever wrote here until now may have saved in the meantime.
                    load = _checkpoint(root, run, resume=True, start_from=None)
                say(f"run directory: {root}")
                launch_local(directory.root, ranks, load and load.root, say, launched=launched)
                ended = True
    except Terminated:
        if not ended:
            say("ended by SIGTERM before the ranks were started, with nothing new to save")
    return root


def _checkpoint(root: Path, run: RunConfig, *, resume: bool, start_from: Path | None) -> Manifest | None:
    """Find and check what to continue from; refuse a directory that is not there for this. Nothing is changed."""
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
    if run.data.corpus and not run.data.paths:
        run = _with_corpus(run, say)
    check_named_data(run)
    check_data(run)
    return run


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
