"""What a start of a run goes on from, when nobody says so: a job that a scheduler requeues has no other arguments.

That is the newest good checkpoint of the run; of a run that has none, the checkpoint that it was to start from
(`launch/start.json`); else nothing. A checkpoint turns out to be damaged when its description is read, or when
its pieces are; the one before it then has to do, and a note lies in the damaged one from then on. Nothing here imports
torch.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from mempar.errors import ConfigError, DamagedError, MemparError
from mempar.runtime.checkpoint.accept import check_same_data, open_checkpoint
from mempar.runtime.checkpoint.retention import checkpoints_in, step_of
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.run_dir import RunDir

_START = "start.json"
_NOTE = "damaged.txt"


def record_start(paths: RunDir, start_from: Path | None) -> None:
    """Write down what a new run starts from.

    Raises:
        OSError: when it cannot be written.
    """
    paths.launch.mkdir(parents=True, exist_ok=True)
    replace_file(paths.launch / _START, json.dumps({"from": start_from and str(start_from)}).encode())


def starting_point(paths: RunDir, run: RunConfig, say: Callable[[str], None]) -> Path | None:
    """Find the checkpoint to go on from; None for a run that begins.

    Args:
        paths: of the run.
        run: the run.
        say: told of every checkpoint that is passed over.

    Raises:
        CheckpointError: when the run cannot go on from the newest checkpoint, or all are damaged.
        ConfigError: when the run's data are others than before.
    """
    damaged: DamagedError | None = None
    for checkpoint in reversed(checkpoints_in(paths.checkpoints)):
        note = _note(checkpoint)
        if note.is_file():
            say(f"{checkpoint.name} is passed over: {note.read_text().strip()}")
            damaged = DamagedError(note.read_text().strip())
            continue
        try:
            check_same_data(open_checkpoint(checkpoint, run), run)
        except DamagedError as error:
            say(f"{checkpoint.name} is passed over: {error}")
            damaged = error
            continue
        return checkpoint
    if damaged is not None:
        raise damaged
    return _start(paths)


def pass_over(checkpoint: Path, paths: RunDir, error: DamagedError, *, writes: bool) -> MemparError:
    """Note that a checkpoint of the run turned out to be damaged, and say what follows from it.

    Args:
        checkpoint: which one.
        paths: of the run.
        error: what was found.
        writes: whether it is for this rank to leave the note; all say the same.

    Returns:
        The error to raise: one after which another start may do better, if there is anything left to go on from.
    """
    if checkpoint.parent != paths.checkpoints:
        return error
    # Newer ones were passed over already.
    earlier = [path for path in checkpoints_in(paths.checkpoints) if step_of(path) < step_of(checkpoint)]
    others = [path for path in earlier if not _note(path).is_file()]
    if not others:
        return error
    if writes:
        with contextlib.suppress(OSError):
            replace_file(_note(checkpoint), f"{error}\n".encode())
    return MemparError(f"{error} The next start of this run goes on from {others[-1].name}.")


def _note(checkpoint: Path) -> Path:
    return checkpoint / _NOTE


def _start(paths: RunDir) -> Path | None:
    path = paths.launch / _START
    try:
        start = json.loads(path.read_text())["from"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} cannot be read; it says which checkpoint a new run starts from; launch the run anew in another "
            "--out."
        ) from None
    return Path(start) if start else None
