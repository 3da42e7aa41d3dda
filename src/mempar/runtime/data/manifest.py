"""What prepared data say about themselves: PREFIX.json beside PREFIX.bin and PREFIX.idx.

`mempar prepare` writes the manifest last, so data that have one are whole. Training reads it to refuse tokens of
another vocabulary and files that were cut short, and checkpoints remember the data by what is in them, not by where
they lie. Data from elsewhere have no manifest; what can be known of them is read from their index. Nothing here
imports torch.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mempar.errors import ConfigError

FORMAT_VERSION = 1
# Megatron's layout of an .idx file, version 1; its code of a dtype is a key here.
_INDEX_MAGIC = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_INDEX_HEADER_BYTES = len(_INDEX_MAGIC) + 1 + 8 + 8
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """Size and checksum of one file."""

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """A description of one .bin/.idx pair.

    Attributes:
        tokenizer: the tokenizer as it was named.
        fingerprint: of what the tokenizer does; equal for equal files, wherever they lie.
        vocab_size: token ids are below it, that of `eod` too.
        eod: token that ends every document.
        dtype: of the tokens in .bin.
        documents: sequences, one a document.
        tokens: ends of documents included.
        largest_token: the largest id that occurs.
        bin: the .bin file.
        idx: the .idx file.
        inputs: path, size and time of change of each file that was read; empty for built-in corpora.
        options: how documents were found and encoded.
        skipped: documents left out, by reason.
        versions: of the software that made them.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    eod: int
    dtype: str
    documents: int
    tokens: int
    largest_token: int
    bin: FileSum
    idx: FileSum
    inputs: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as PREFIX.json holds it."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of PREFIX.bin and PREFIX.idx."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> DataManifest | None:
    """Read the manifest of a .bin/.idx pair; None where there is none.

    Raises:
        ConfigError: for one that cannot be read, or of another format.
    """
    path = manifest_path(prefix)
    try:
        found = json.loads(path.read_text())
        version = found.pop("format")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format {version}; this version reads format {FORMAT_VERSION}; use the mempar that wrote "
                "it, or prepare the data again."
            )
        binary, index = (FileSum(**found.pop(name)) for name in ("bin", "idx"))
        return DataManifest(bin=binary, idx=index, **found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a manifest ({error}); prepared data are described by it; prepare them again, or "
            "delete it if it belongs to something else."
        ) from None


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What an .idx file says: dtype of the tokens, sequences, documents and the tokens of all sequences."""

    dtype: str
    sequences: int
    documents: int
    tokens: int


def read_index(prefix: str | Path) -> IndexHeader:
    """Read what the .idx file of a pair says of it.

    Raises:
        ConfigError: when it is no such file.
    """
    path = Path(f"{prefix}.idx")
    with path.open("rb") as stream:
        head = stream.read(_INDEX_HEADER_BYTES)
    code = head[len(_INDEX_MAGIC)] if len(head) == _INDEX_HEADER_BYTES else 0
    sequences, boundaries = (int.from_bytes(head[start : start + 8], "little") for start in (18, 26))
    wanted_bytes = _INDEX_HEADER_BYTES + 12 * sequences + 8 * boundaries
    if not head.startswith(_INDEX_MAGIC) or code not in _DTYPES or path.stat().st_size < wanted_bytes:
        raise ConfigError(
            f"{path} is no index of Megatron's, or is cut short ({path.stat().st_size} bytes); it begins with MMIDIDX, "
            "version 1, and lists every sequence; make the data again."
        )
    tokens = 0
    if sequences:
        lengths = np.memmap(path, dtype=np.int32, mode="r", offset=_INDEX_HEADER_BYTES, shape=(sequences,))
        tokens = int(lengths.sum(dtype=np.int64))
    return IndexHeader(dtype=_DTYPES[code], sequences=sequences, documents=max(0, boundaries - 1), tokens=tokens)


def index_header(dtype: np.dtype, num_documents: int) -> bytes:
    """The first bytes of an .idx file of `num_documents` documents of one sequence each."""
    code = next(code for code, name in _DTYPES.items() if name == dtype.name)
    counts = num_documents.to_bytes(8, "little") + (num_documents + 1).to_bytes(8, "little")
    return _INDEX_MAGIC + bytes([code]) + counts


def checksum(path: Path) -> FileSum:
    """Read a file through and return its size and checksum."""
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileSum(num_bytes=num_bytes, xxh3_128=digest.hexdigest())
