"""Starting a run again after a failure, from its last good checkpoint, a limited number of times.

Bad input is not tried again, nor is what somebody ended. Under SLURM the job's own script does the same by queueing the
job again (slurm_script.py).
"""

import time
from collections.abc import Callable

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch.stopping import Terminated, sigterm_raises

# For ports and locks of the ranks that ended to be free again; then twice as long each time, up to the most: what made
# the run fail, such as a file system that is away, may need its time.
_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 3.0, 300.0


def with_restarts(
    start: Callable[[int], None],
    max_restarts: int,
    say: Callable[[str], None],
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> None:
    """Start a run until it ends well; must be called in the main thread.

    Args:
        start: given the number of the start, from 0; returns when the run has ended well, or was told to end.
        max_restarts: after failures.
        say: told of every failure after which the run is started again.
        is_told_to_end: whether somebody asked the run to end, which may then fail in that.

    Raises:
        MemparError: the last failure, when there may be no more restarts, or the first one that none would mend.
    """
    try:
        with sigterm_raises():
            _start_until_well(start, max_restarts, say, is_told_to_end)
    except Terminated:
        say("ended by SIGTERM while nothing was running, with nothing new to save; go on with --resume")


def _start_until_well(
    start: Callable[[int], None], max_restarts: int, say: Callable[[str], None], is_told_to_end: Callable[[], bool]
) -> None:
    number = 0
    while True:
        try:
            return start(number)
        except MemparError as error:
            number += 1
            if error.exit_status == ConfigError.exit_status or number > max_restarts or is_told_to_end():
                raise
            say(f"{error}\nrestart {number} of {max_restarts}, from the last good checkpoint")
        time.sleep(pause_seconds(number))


def pause_seconds(number: int) -> float:
    """How long is waited before restart `number`, counted from 1."""
    # No power so large that it is no float.
    return min(_PAUSE_SECONDS * 2 ** min(number - 1, 32), _MOST_PAUSE_SECONDS)
