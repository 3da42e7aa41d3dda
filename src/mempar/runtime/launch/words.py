"""What a launcher and its agents on other nodes say to each other, over the pipes of a remote shell.

The launcher writes lines to the agent's standard input: a beat every few seconds, and signals by their names. An agent
that hears nothing for a while, or sees the end of its input, has lost its launcher: its ranks are killed, and it ends.
The agent writes its ranks' output, and at last its verdict in one line that the launcher knows by its beginning.
Nothing here imports torch.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import IO

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch.supervisor import Supervisor

BEAT, KILL = "beat", "KILL"
SIGNALS = (signal.SIGTERM.name, signal.SIGINT.name)
BEAT_SECONDS = 2.0
# Longer than a slow network takes, shorter than it takes somebody to start the run again.
SILENCE_SECONDS = 30.0
_NAP_SECONDS = 1.0
# For ranks that were killed to be gone; what waits in native code does not hear otherwise.
_LEAVE_SECONDS = 5.0
_VERDICT = "@mempar-verdict "


class Listener:
    """An agent's ear: passes on what the launcher says, and ends everything when it says nothing."""

    def __init__(self, source: IO[str] = sys.stdin) -> None:
        """Describe it; `start` begins."""
        self._source, self._heard = source, time.monotonic()
        self._lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether the launcher is gone."""
        return self._lost.is_set()

    def start(self, supervisor: Supervisor) -> None:
        """Listen for a supervisor, from now on until the process ends."""
        for work in (self._listen, self._watch):
            threading.Thread(target=work, args=(supervisor,), name="listener", daemon=True).start()

    def _listen(self, supervisor: Supervisor) -> None:
        for line in self._source:
            self._heard = time.monotonic()
            word = line.strip()
            if word in SIGNALS:
                supervisor.wish(word)
            elif word == KILL:
                supervisor.end_now()
        self._end(supervisor)

    def _watch(self, supervisor: Supervisor) -> None:
        # Counted in naps: while all of this process stands still, as when it loads libraries over a network, it hears
        # nothing, and time alone would take that for silence.
        heard, silent = self._heard, 0.0
        while silent < SILENCE_SECONDS:
            time.sleep(_NAP_SECONDS)
            heard, silent = (heard, silent + _NAP_SECONDS) if self._heard == heard else (self._heard, 0.0)
        self._end(supervisor)

    def _end(self, supervisor: Supervisor) -> None:
        self._lost.set()
        supervisor.end_now()
        time.sleep(_LEAVE_SECONDS)
        # Ranks die with this process.
        os._exit(1)


def tell(error: MemparError | None, target: IO[str] = sys.stdout) -> None:
    """Say how a node's part ended; None for well."""
    status, text = (error.exit_status, str(error)) if error else (0, "")
    target.write(f"\n{_VERDICT}{json.dumps({'status': status, 'text': text})}\n")
    target.flush()


def hear_verdict(line: str) -> tuple[bool, MemparError | None]:
    """Read a line that an agent wrote.

    Returns:
        Whether it is a verdict, and the error that it tells of, if any.
    """
    if not line.startswith(_VERDICT):
        return False, None
    try:
        said = json.loads(line.removeprefix(_VERDICT))
        status, text = int(said["status"]), str(said["text"])
    except (ValueError, KeyError, TypeError):
        return False, None
    if status == 0:
        return True, None
    return True, ConfigError(text) if status == ConfigError.exit_status else MemparError(text)
