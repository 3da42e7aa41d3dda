"""PREFIX.partial/: what is done so far, so that an interrupted command goes on where it stopped.

    command.json   what was asked for; another command is refused
    tokens         grows batch by batch and becomes PREFIX.bin
    lengths        int32, tokens of each document
    journal        a line a batch: counts, the checksum of what it added, the place where reading goes on
    lock           held by the one command that writes

A line is written after the bytes that it describes. On opening, everything is read and compared with the checksums;
what has no line, or does not agree with it, is cut off and made again. At the end files are renamed into place, the
manifest last; until then nothing at PREFIX can be taken for whole.
"""

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mempar.errors import ConfigError
from mempar.runtime.data.manifest import DataManifest, FileSum
from mempar.runtime.durable import replace_file, sync
from mempar.tools.prepare.encoding import Encoded
from mempar.tools.prepare.index import write_index
from mempar.tools.prepare.segments import Position

_MAX_DOCUMENT_TOKENS = 2**31 - 1
_FILES = ("bin", "idx", "json")


@dataclass(frozen=True, kw_only=True)
class Done:
    """What has been written.

    Attributes:
        tokens: in all.
        documents: that have ended.
        open_tokens: of a document that goes on.
        largest_token: the largest id; -1 before the first.
        empty: documents left out because they have no tokens.
        bad: documents left out because they are no text.
        num_bytes_read: of the inputs.
        after: where reading goes on.
        xxh3_128: checksum of what the last batch added.
    """

    tokens: int = 0
    documents: int = 0
    open_tokens: int = 0
    largest_token: int = -1
    empty: int = 0
    bad: int = 0
    num_bytes_read: int = 0
    after: Position = field(default_factory=Position)
    xxh3_128: str = ""

    @classmethod
    def from_line(cls, line: bytes) -> "Done":
        """Read a line of the journal."""
        found = json.loads(line)
        return cls(**{**found, "after": Position(**found["after"])})


class Partial:
    """Writes to PREFIX.partial/ and turns it into PREFIX.bin, .idx and .json."""

    def __init__(self, prefix: Path, command: dict[str, Any], dtype: np.dtype) -> None:
        """Open the directory, or make it, and check what it holds.

        Args:
            prefix: path of the result without suffix.
            command: what must be equal for the command to be the same.
            dtype: of the tokens.

        Raises:
            ConfigError: when it belongs to another command, or one that still runs.
        """
        self.prefix, self.dtype = prefix, dtype
        self.directory = partial_directory(prefix)
        self.done = Done()
        self._checksum = xxhash.xxh3_128()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"{self.directory} cannot be written ({error.strerror}); results grow there; choose another --out."
            ) from None
        self._streams: dict[str, IO[bytes]] = {}
        try:
            self._take_lock()
            self._check_command(command)
            self.finished = is_finished(self.directory)
            if not self.finished:
                self._streams = {name: self._open(name) for name in ("tokens", "lengths", "journal")}
                self._replay()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files, and of the lock last."""
        for stream in (*self._streams.values(), self._lock):
            stream.close()

    def add(self, encoded: Encoded, after: Position, num_bytes_read: int) -> None:
        """Write a batch.

        Raises:
            ConfigError: for a document of more tokens than an index can hold.
        """
        lengths, open_tokens = self._closed_lengths(encoded)
        tokens, length_bytes = encoded.tokens.view(np.uint8).data, lengths.tobytes()
        self._write("tokens", tokens)
        self._write("lengths", length_bytes)
        self._checksum.update(tokens)
        self.done = Done(
            tokens=self.done.tokens + encoded.tokens.size,
            documents=self.done.documents + lengths.size,
            open_tokens=open_tokens,
            largest_token=int(max(self.done.largest_token, encoded.tokens.max(initial=0))),
            empty=self.done.empty + encoded.empty,
            bad=self.done.bad + len(encoded.bad),
            num_bytes_read=num_bytes_read,
            after=after,
            xxh3_128=_checksum(tokens, length_bytes),
        )
        self._write("journal", json.dumps(asdict(self.done)).encode() + b"\n")

    def finish(self, manifest: DataManifest) -> DataManifest:
        """Write the index, complete the manifest with counts and checksums, and rename all into place."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        index = write_index(self.directory / "idx", self.directory / "lengths", self.dtype, self.done.documents)
        num_bytes = self.done.tokens * self.dtype.itemsize
        manifest = replace(
            manifest,
            documents=self.done.documents,
            tokens=self.done.tokens,
            largest_token=self.done.largest_token,
            skipped={"empty": self.done.empty, "bad": self.done.bad},
            bin=FileSum(num_bytes=num_bytes, xxh3_128=self._checksum.hexdigest()),
            idx=index,
        )
        replace_file(self.directory / "json", manifest.to_json().encode())
        os.replace(self.directory / "tokens", self.directory / "bin")
        self.publish()
        return manifest

    def publish(self) -> None:
        """Rename the finished files into place, or those that are left of them, the manifest last."""
        for suffix in _FILES:
            path = self.directory / suffix
            if path.exists():
                os.replace(path, f"{self.prefix}.{suffix}")
        sync(self.prefix.parent)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.directory} is being written by another command; one at a time can; wait for it, or choose "
                "another --out."
            ) from None

    def _check_command(self, command: dict[str, Any]) -> None:
        path = self.directory / "command.json"
        journal = self.directory / "journal"
        if path.exists() and journal.exists() and journal.stat().st_size:
            before = json.loads(path.read_text())
        else:
            # Nothing has been done yet, for whatever command.
            before = command
            replace_file(path, (json.dumps(command, indent=1) + "\n").encode())
        if before != command:
            keys = [key for key in command if before.get(key) != command[key]]
            raise ConfigError(
                f"{self.directory} holds the beginning of another command: {', '.join(keys)} differ; only the very "
                "same command goes on from there; repeat it, delete that directory, or choose another --out."
            )

    def _open(self, name: str) -> IO[bytes]:
        return os.fdopen(os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)

    def _write(self, name: str, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:
            view = view[self._streams[name].write(view) :]

    def _replay(self) -> None:
        """Go through what was written as long as it agrees with the journal, and cut off the rest."""
        tokens_file, lengths_file, journal = self._streams.values()
        journal_bytes = 0
        for line in journal.read().splitlines(keepends=True):
            try:
                done = Done.from_line(line)
            except (ValueError, TypeError, KeyError):
                break
            tokens = tokens_file.read((done.tokens - self.done.tokens) * self.dtype.itemsize)
            lengths = lengths_file.read((done.documents - self.done.documents) * 4)
            if not line.endswith(b"\n") or _checksum(tokens, lengths) != done.xxh3_128:
                break
            self._checksum.update(tokens)
            self.done = done
            journal_bytes += len(line)
        sizes = (self.done.tokens * self.dtype.itemsize, self.done.documents * 4, journal_bytes)
        for stream, size in zip(self._streams.values(), sizes, strict=True):
            stream.truncate(size)
            stream.seek(size)

    def _closed_lengths(self, encoded: Encoded) -> tuple[np.ndarray, int]:
        """Lengths `[documents] int32` of the documents that end in a batch, and the tokens of one that does not."""
        totals = np.cumsum(encoded.lengths)[encoded.ends]
        lengths = np.diff(totals, prepend=0)
        if lengths.size:
            lengths[0] += self.done.open_tokens
            open_tokens = int(encoded.lengths.sum() - totals[-1])
        else:
            open_tokens = self.done.open_tokens + int(encoded.lengths.sum())
        longest = max(int(lengths.max(initial=0)), open_tokens)
        if longest > _MAX_DOCUMENT_TOKENS:
            raise ConfigError(
                f"document {self.done.documents + 1} of {self.prefix} has more than {_MAX_DOCUMENT_TOKENS} tokens; "
                "Megatron's index counts them in 32 bits; cut it, or choose other --documents."
            )
        return lengths.astype(np.int32), open_tokens


def partial_directory(prefix: Path) -> Path:
    """Where a result grows."""
    return Path(f"{prefix}.partial")


def is_finished(directory: Path) -> bool:
    """Whether the files in the directory, or what is left of them, only wait to be renamed into place."""
    # `tokens` gets another name when all else is written.
    return (directory / "json").exists() and not (directory / "tokens").exists()


def occupied(prefix: Path) -> list[str]:
    """Files of the result that exist already."""
    return [path for suffix in _FILES if os.path.lexists(path := f"{prefix}.{suffix}")]


def _checksum(tokens: bytes | memoryview, lengths: bytes) -> str:
    digest = xxhash.xxh3_128(tokens)
    digest.update(lengths)
    return digest.hexdigest()
