"""One writer at a time: locks of a run's directory that the kernel takes back when their holders die.

Whoever launches a run holds `lock` alone, from before anything in the directory changes until all ranks have ended.
The ranks share `lock.ranks`, so that a launcher that was killed leaves the directory locked for the second that its
ranks need to follow it. The files stay; what counts is who holds them. Nothing here imports torch.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from mempar.errors import ConfigError

LOCK_NAME, RANKS_LOCK_NAME = "lock", "lock.ranks"
# How long the ranks of a killed launcher are waited for.
_PATIENCE_SECONDS = 3.0
_POLL_SECONDS = 0.1
# Lustre without `-o flock`, and some other network file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The sole right to write in a run's directory, as a context."""

    def __init__(self, root: Path, say: Callable[[str], None], patience: float | None = None) -> None:
        """Describe it; nothing is touched yet.

        Args:
            root: the run's directory; made if it is absent.
            say: prints a line.
            patience: seconds to wait for whoever has it; those that ranks need to follow their launcher unless given.
        """
        self._root, self._say = root, say
        self._patience = _PATIENCE_SECONDS if patience is None else patience
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        """Take it.

        Raises:
            ConfigError: when another process writes there, or the directory cannot be written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            file = (self._root / LOCK_NAME).open("a+")
        except OSError as error:
            raise self._not_writable(error) from None
        until = time.monotonic() + self._patience
        try:
            self._wait_for(file, until, "")
            with (self._root / RANKS_LOCK_NAME).open("a+") as ranks:
                self._wait_for(ranks, until, "the ranks of ")
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise self._not_writable(error) from None
            self._say(
                f"warning: {self._root} lies on a file system without locks ({error.strerror}): nothing keeps a second "
                "run from writing there; see that there is none."
            )
        except BaseException:
            file.close()
            raise
        try:
            self._sign(file)
        except OSError as error:
            # What could not be written is still in its buffer, and closing tries again.
            with suppress(OSError):
                file.close()
            raise self._not_writable(error) from None
        self._file = file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        if self._file is not None:
            self._file.close()

    def _sign(self, file: IO[str]) -> None:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
        file.flush()

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._root} cannot be written ({error.strerror}); a run needs a writable directory with room; make room "
            "there, or choose another --out."
        )

    def _wait_for(self, file: IO[str], until: float, whose: str) -> None:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ConfigError(f"{self._root} is in use: {whose}{_holder(self._root)}") from None
                time.sleep(_POLL_SECONDS)


def share_lock(root: Path) -> IO[str] | None:
    """Take a rank's part of the lock, held until the file is closed or the process dies.

    Returns:
        The file; None where the directory is not there or its file system has no locks.
    """
    try:
        file = (root / RANKS_LOCK_NAME).open("a+")
    except OSError:
        return None
    try:
        # Held by a launcher that looks whether anyone is here, if at all.
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        file.close()
        return None
    return file


def _holder(root: Path) -> str:
    try:
        said = json.loads((root / LOCK_NAME).read_text())
        who = f"process {said['pid']} on {said['host']} has been writing there since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process writes there"
    return f"{who}; a run has one writer; wait for it, end it (SIGTERM lets it save), or choose another --out."
