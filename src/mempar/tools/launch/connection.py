"""A command that reaches nodes, ssh or srun, and the lines that go to and fro while it runs."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Sequence

# For the reader to see the end of what is written.
_READ_SECONDS = 10.0


class Connection:
    """A running command; what it starts elsewhere ends when its input does."""

    def __init__(self, command: Sequence[str], hear: Callable[[str], None]) -> None:
        """Start it.

        Args:
            command: and its arguments.
            hear: given every line that it writes, in a thread of its own.

        Raises:
            OSError: when there is no such command.
        """
        self._hear = hear
        pipe = subprocess.PIPE
        # A session of its own: ^C reaches the launcher alone, which passes it on.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True, bufsize=0
        )
        self._reader = threading.Thread(target=self._read, name=f"reader of {command[0]}", daemon=True)
        self._reader.start()

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    def tell(self, word: str) -> None:
        """Say a word; who is gone does not hear it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(f"{word}\n".encode())

    @property
    def is_heard(self) -> bool:
        """Whether the end of what it writes has come."""
        return not self._reader.is_alive()

    def has_ended(self) -> bool:
        """Whether it has ended, and what it wrote was heard."""
        if self.status is None:
            return False
        # What it leaves behind may hold its output open, such as the master of connections that others share.
        self._reader.join(timeout=1.0)
        return True

    def close(self) -> None:
        """End it; what it started elsewhere ends with it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(timeout=_READ_SECONDS)
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in iter(self.process.stdout.readline, b""):
            self._hear(raw.decode(errors="replace").rstrip("\r\n"))
