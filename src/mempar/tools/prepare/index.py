"""Megatron's .idx file of documents of one sequence each, written block by block from their lengths."""

import os
from pathlib import Path

import numpy as np
import xxhash

from mempar.runtime.data.manifest import FileSum, index_header

_BLOCK = 1 << 20
# Megatron's rule (DType.optimal_dtype): its other 16-bit ids are left free.
_LARGEST_UINT16_VOCAB = 65499


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron gives to a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= _LARGEST_UINT16_VOCAB else np.int32)


def write_index(path: Path, lengths_path: Path, dtype: np.dtype, num_documents: int) -> FileSum:
    """Write an index.

    Args:
        path: of the .idx file.
        lengths_path: `[documents] int32`, tokens of each document.
        dtype: of the tokens in the .bin file.
        num_documents: documents.

    Returns:
        Its size and checksum.
    """
    digest = xxhash.xxh3_128()
    with path.open("wb") as stream:

        def write(block: bytes) -> None:
            stream.write(block)
            digest.update(block)

        write(index_header(dtype, num_documents))
        starts = range(0, num_documents, _BLOCK)
        for start in starts:
            write(_lengths(lengths_path, start).tobytes())
        # Where each document begins, in bytes.
        begin = 0
        for start in starts:
            ends = begin + np.cumsum(_lengths(lengths_path, start), dtype=np.int64) * dtype.itemsize
            write(np.concatenate([[begin], ends[:-1]]).astype(np.int64).tobytes())
            begin = int(ends[-1])
        # Document d is sequences d to d + 1.
        for start in range(0, num_documents + 1, _BLOCK):
            write(np.arange(start, min(start + _BLOCK, num_documents + 1), dtype=np.int64).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
        num_bytes = stream.tell()
    return FileSum(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def _lengths(path: Path, start: int) -> np.ndarray:
    return np.fromfile(path, dtype=np.int32, count=_BLOCK, offset=4 * start)
