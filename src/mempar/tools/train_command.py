"""`mempar train`: resolve a recipe, check everything that can be checked, and start the ranks."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from mempar.recipes import find_recipe
from mempar.runtime.checkpoint.accept import check_same_data
from mempar.runtime.launch.local import launch_local
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.overrides import override
from mempar.runtime.preflight import check_layout
from mempar.runtime.run_dir import RunDir, open_existing, open_new
from mempar.tools.launch.provenance import save, take
from mempar.tools.run_start import find_checkpoint, nothing_to_continue, root_of, with_data


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
    root = root_of(run, out, resume=resume, start_from=start_from)
    ended = False
    try:
        with sigterm_raises():
            load = find_checkpoint(root, run, resume=resume, start_from=start_from)
            run = with_data(run, say)
            if resume and load is not None:
                check_same_data(load, run)
            with RunLock(root, say):
                if resume and not RunDir(root).config.exists():
                    say(nothing_to_continue(root))
                directory = open_existing(root, run) if resume else open_new(root, run)
                if resume:
                    # Whoever wrote here until now may have saved in the meantime.
                    load = find_checkpoint(root, run, resume=True, start_from=None)
                save(take(sys.argv), directory.launch)
                say(f"run directory: {root}")
                launch_local(directory.root, ranks, load and load.root, say, launched=launched)
                ended = True
    except Terminated:
        if not ended:
            say("ended by SIGTERM before the ranks were started, with nothing new to save")
    return root
