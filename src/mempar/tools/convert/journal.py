"""What of a conversion is done: a line for each job, on the disk before the job counts as done.

It lies beside the directory that is being made, not in it, and goes when that has its name. Whoever writes holds its
lock, so that two conversions to one place cannot meet.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import checksum
from mempar.runtime.durable import sync


class Journal:
    """The journal of one conversion, open and locked.

    Attributes:
        results: of jobs that are done, by their keys.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Open it, or begin it.

        Args:
            path: of the file.
            identity: of the conversion; whatever was done for another one is not taken for this one's.

        Raises:
            ConfigError: when another process writes it, or it is another conversion's.
            OSError: when it cannot be written.
        """
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.results = self._read(identity)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is in use: another conversion to this place is under way; one at a time can write it; "
                "wait for it, or choose another destination."
            ) from None

    def _read(self, identity: str) -> dict[str, Any]:
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
        # What follows the last line's end was being written when it ended.
        entries = [_decode(line) for line in lines[:-1]]
        if not entries:
            os.ftruncate(self._file, 0)
            self._append({"identity": identity})
            sync(self.path.parent)
            return {}
        if None in entries:
            raise ConfigError(
                f"{self.path} is no journal of a conversion, or damaged; --resume goes on by what it says; remove it "
                "and the directory beside it if a conversion made them, or choose another destination."
            )
        whole = [entry for entry in entries if entry is not None]
        if whole[0].get("identity") != identity:
            raise ConfigError(
                f"{self.path} belongs to another conversion: of another source or to another layout, format or "
                "precision; --resume continues the one that was begun; give it the same arguments, or remove "
                f"{self.path} and the directory beside it."
            )
        kept = sum(len(line) + 1 for line in lines[:-1])
        os.ftruncate(self._file, kept)
        return {entry["key"]: entry["result"] for entry in whole[1:] if "key" in entry}

    def add(self, key: str, result: Any) -> None:
        """Note that a job is done; what it wrote is on the disk."""
        entry = {"key": key, "result": result}
        self._append(entry)
        # As it would be read again.
        self.results[key] = json.loads(json.dumps(entry))["result"]

    def _append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, separators=(",", ":"))
        line = f"{checksum(text.encode())} {text}\n".encode()
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def close(self, *, remove: bool = False) -> None:
        """Let go of it; `remove` when all is done."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def _decode(line: bytes) -> dict[str, Any] | None:
    """An entry, if the line is whole."""
    digits, _, text = line.partition(b" ")
    return json.loads(text) if digits.decode(errors="replace") == checksum(text) else None
