"""One node of several: `python -m mempar.tools.doctor.node`, started by ssh or srun, lives on the words of the command.

It looks at its machine, answers, and starts its ranks of the smoke test if it is told to, as launches start theirs.
When the command is silent, gone or wants an end, it ends at once, and its ranks with it.
"""

import argparse
import contextlib
import dataclasses
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mempar.errors import MemparError
from mempar.runtime.launch.local import run_together
from mempar.runtime.launch.nodes import Node
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.launch.words import BEAT, KILL, SILENCE_SECONDS
from mempar.tools.doctor import environment
from mempar.tools.doctor.environment import NodePlace
from mempar.tools.doctor.looking import Others, look
from mempar.tools.doctor.wire import (
    ANSWER,
    ENDED,
    FAILED,
    HELLO,
    Answer,
    Question,
    Trial,
    lines_of,
    read_question,
    read_trial,
)

# The word that ends a node which has nothing more to do.
END = "end"
_WORKER = "mempar.tools.doctor.smoke_rank"
# For what another machine wrote to be seen here: file systems keep what they know for a while.
_SEE_SECONDS, _POLL_SECONDS = 10.0, 0.5
# To remove what was begun; then it ends wherever it is.
_LEAVE_SECONDS = 3.0


class _Ear:
    """Hears the command, and ends this process when there is nothing more to hear."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        self._heard = time.monotonic()
        for work in (self._listen, self._watch):
            threading.Thread(target=work, name="ear", daemon=True).start()

    def next(self) -> str:
        """The next line that is not for this class."""
        return self._lines.get()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._heard = time.monotonic()
            word = line.strip()
            if word == KILL:
                break
            if word and word != BEAT:
                self._lines.put(word)
        self._leave()

    def _watch(self) -> None:
        while time.monotonic() - self._heard < SILENCE_SECONDS:
            time.sleep(1.0)
        self._leave()

    def _leave(self) -> None:
        # Not SIGINT: shells start what they put in the background with that ignored.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_LEAVE_SECONDS)
        # The main thread may wait in native code, where nothing else reaches it.
        _exit(1)


def main(given: Sequence[str] | None = None) -> int:
    """Be a node; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mempar.tools.doctor.node")
    parser.add_argument("--node-rank", type=int, help="its number; the scheduler's unless given")
    parser.add_argument("--node", default="", help="its name; the scheduler's, or the host's own, unless given")
    said = parser.parse_args(given)
    scheduled = environment.node_place()
    place = NodePlace(
        node_rank=scheduled.node_rank if said.node_rank is None else said.node_rank, name=said.node or scheduled.name
    )
    try:
        with sigterm_raises():
            _serve(place, _Ear())
    except (KeyboardInterrupt, Terminated, BrokenPipeError):
        return 130
    # Whatever it is, it is for the command to say; here it would be one more voice among many.
    except Exception as error:
        _say(place, FAILED, {"text": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _serve(place: NodePlace, ear: _Ear) -> None:
    _say(place, HELLO, {"name": place.name})
    answer = _answer(place, read_question(ear.next()))
    _say(place, ANSWER, {**dataclasses.asdict(answer), "findings": [one.as_dict() for one in answer.findings]})
    while (line := ear.next()) != END:
        _say(place, ENDED, _try_out(place, read_trial(line)))


def _answer(place: NodePlace, question: Question) -> Answer:
    unshared = _unshared(Path(question.shared))
    others = Others(peer=_peer(place, question.hosts), is_shared=not unshared)
    seen = look(question.needs, Path(question.root), question.num_ranks, lambda what: None, others)
    return Answer(
        name=place.name,
        findings=seen.findings,
        unshared=unshared,
        packages={"Python": seen.installed.python, **seen.installed.versions},
        devices=tuple(device.name for device in seen.computer.devices),
        num_ranks=seen.num_ranks,
    )


def _unshared(directory: Path) -> str:
    """What is wrong with the shared directory as seen from here."""
    until = time.monotonic() + _SEE_SECONDS
    while not directory.is_dir():
        if time.monotonic() > until:
            return "is not there"
        time.sleep(_POLL_SECONDS)
    return "" if os.access(directory, os.W_OK) else "cannot be written"


def _peer(place: NodePlace, hosts: tuple[str, ...]) -> str:
    """Another node, as it is reached from here."""
    if hosts:
        return next((name for rank, name in enumerate(hosts) if rank != place.node_rank), "")
    others = [name for name in environment.allocation().hosts if name != place.name]
    return environment.node_address(others[0]) if others else ""


def _try_out(place: NodePlace, trial: Trial) -> dict[str, Any]:
    """Run this node's ranks."""
    node = Node(
        name=place.name,
        num_ranks=trial.num_ranks,
        node_rank=place.node_rank,
        num_nodes=trial.num_nodes,
        rendezvous=trial.rendezvous,
        attempt=Path(trial.reports).name,
    )
    command = [sys.executable, "-m", _WORKER, "--reports", trial.reports, "--patience", str(trial.patience)]
    command += ["--node", place.name, "--launcher", str(os.getpid())]
    try:
        statuses = run_together(command, node, trial.gather_seconds, lambda: False)
    except MemparError as error:
        return {"error": str(error), "statuses": {}}
    return {"error": "", "statuses": {str(rank): status for rank, status in (statuses or {}).items()}}


def _exit(status: int) -> NoReturn:
    """Leave, with all that was started: ranks die with this process, but not those that did not come to ask for it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # The interpreter's own way out needs the lock of standard input, which the listening thread holds.
    os._exit(status)


def _say(place: NodePlace, kind: str, values: dict[str, Any]) -> None:
    for line in lines_of(place.node_rank, kind, values):
        print(line, flush=True)


if __name__ == "__main__":
    _exit(main())
