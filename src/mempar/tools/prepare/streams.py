"""Files as streams of bytes, decompressed; damage is reported as damage."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from mempar.errors import ConfigError
from mempar.tools.prepare.inputs import Input

_BLOCK_BYTES = 1 << 17
# What the decompressors raise for data that are damaged or cut short.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)


class Bytes:
    """The decompressed bytes of one file, and how far the file itself has been read."""

    def __init__(self, source: Input, raw: IO[bytes]) -> None:
        self._source, self._raw = source, raw
        self._stream = _decompressed(source, raw)

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the file, compressed as they may be."""
        return self._raw.tell()

    def read(self, num_bytes: int) -> bytes:
        """Read exactly so many bytes, fewer at the end alone.

        Raises:
            ConfigError: for damaged data.
        """
        blocks, missing = [], num_bytes
        try:
            while missing and (block := self._stream.read(missing)):
                blocks.append(block)
                missing -= len(block)
        except _DAMAGE as error:
            raise ConfigError(
                f"{self._source.path} cannot be read on: {error or type(error).__name__}; the file is damaged or cut "
                "short; fetch it again."
            ) from None
        return b"".join(blocks)

    def skip(self, num_bytes: int) -> None:
        """Go on after the first `num_bytes` bytes."""
        if not self._source.compression:
            self._raw.seek(num_bytes)
            return
        while num_bytes:
            num_bytes -= len(self.read(min(num_bytes, 1 << 20))) or num_bytes


@contextmanager
def open_bytes(source: Input) -> Iterator[Bytes]:
    """Open a file for reading what was compressed."""
    try:
        raw = source.path.open("rb")
    except OSError as error:
        raise ConfigError(
            f"{source.path} cannot be opened ({error.strerror}); every INPUT is read; see to it, or leave it out."
        ) from None
    with raw:
        yield Bytes(source, raw)


def _decompressed(source: Input, raw: IO[bytes]) -> Any:
    if source.compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == "bz2":
        return bz2.BZ2File(raw)
    if source.compression == "xz":
        return lzma.LZMAFile(raw)
    return io.BufferedReader(_Zstandard(source, raw), _BLOCK_BYTES) if source.compression == "zst" else raw


class _Zstandard(io.RawIOBase):
    """Frames of zstandard one after another; the library's own reader takes a frame that is cut short for whole."""

    def __init__(self, source: Input, raw: IO[bytes]) -> None:
        super().__init__()
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                f"{source.path} is compressed by zstandard, and the package `zstandard` is not installed; it comes "
                "with an extra; pip install 'mempar[data]'."
            ) from None
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._raw.read(_BLOCK_BYTES)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the compressed data end in the middle of a frame")
                return 0
            self._ready = self._decompress(compressed)
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes

    def _decompress(self, compressed: bytes) -> bytes:
        pieces = []
        while compressed:
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                pieces.append(self._frame.decompress(compressed))
            except self._library.ZstdError as error:
                raise ValueError(str(error)) from None
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(pieces)
