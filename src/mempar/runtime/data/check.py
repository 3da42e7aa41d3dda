"""Whether data fit the run, and which data they are; nothing here imports torch.

Prepared data are known by their manifest. Of data from elsewhere the index is compared with the size of the .bin
file, and the token ids are looked at: all of them in files of up to `SCANNED_BYTES`, beyond it blocks of
as many bytes in all from all over the file. Whatever that misses, `data.py` meets when it reads a sample.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.encoders import file_fingerprint
from mempar.runtime.data.manifest import DataManifest, checksum, read_index, read_manifest
from mempar.runtime.data.tokenizer import TokenizerSpec, parse_spec, vocab_size
from mempar.runtime.data.trigram import MAX_VOCAB_SIZE

SCANNED_BYTES = 1 << 32
# In the identity of prepared data: the fingerprint of their tokenizer.
TOKENIZER = "tokenizer"
_BLOCK_BYTES = 1 << 24


def check_files(run: RunConfig) -> None:
    """Refuse .bin/.idx pairs, all of which must exist, that are not what the run takes them for.

    Raises:
        ConfigError: for files cut short, and for tokens of another tokenizer or beyond the vocabulary.
    """
    spec, size = parse_spec(run.data.tokenizer), vocab_size(run)
    if run.data.trigram_baseline and run.train.heldout_samples and size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"data.trigram_baseline=true with the {size} tokens of data.tokenizer={run.data.tokenizer}; trigrams are "
            f"counted in a table of the vocabulary's third power, of at most {MAX_VOCAB_SIZE} tokens; set "
            "data.trigram_baseline=false."
        )
    for path in dict.fromkeys((*run.data.paths, *run.data.heldout_paths)):
        manifest = read_manifest(path)
        if manifest is None:
            _check_foreign(path, run.model.vocab_size or size)
        else:
            _check_prepared(path, manifest, spec)


def check_lengths(run: RunConfig) -> None:
    """Refuse .bin/.idx pairs that a run reads, and that have less than one of its samples.

    Raises:
        ConfigError: when they do.
    """
    for path in (*run.data.paths, *(run.data.heldout_paths if run.train.heldout_samples else ())):
        manifest = read_manifest(path)
        check_length(path, read_index(path).tokens if manifest is None else manifest.tokens, run.train.seq_length)


def check_length(path: str, tokens: int, seq_length: int) -> None:
    """Refuse data of which not one sample can be made.

    Args:
        path: of the data, for the message.
        tokens: in all.
        seq_length: of a sample, whose last label is one more.

    Raises:
        ConfigError: when they are too few.
    """
    if tokens <= seq_length:
        raise ConfigError(
            f"{path} holds {tokens} tokens, fewer than one sample of train.seq_length={seq_length} and its last label; "
            "use more data or shorter sequences."
        )


def data_identity(run: RunConfig) -> dict[str, dict[str, int | str]]:
    """What is in the data of a run, wherever they lie: for checkpoints to remember.

    Returns:
        For `data.paths[0]`, `data.paths[1]`, ...: `documents`, `tokens`, `bin_bytes`, `idx_bytes` and `idx_xxh3_128`,
        and of prepared data `bin_xxh3_128` and `tokenizer`, its fingerprint. Checksums of prepared data are those of
        their manifests; of other data the .idx file is read through.

    Raises:
        ConfigError: for an index or manifest that cannot be read.
    """
    return {f"data.paths[{place}]": _identity(path) for place, path in enumerate(run.data.paths)}


def identity_differences(saved: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """Compare two results of `data_identity`; what only one of them knows is not compared.

    Returns:
        A phrase for each path whose data differ: the first of their figures that does, of which sizes are said before
        checksums. None if the data are the same.
    """
    if len(saved) != len(now):
        return [f"data.paths are {len(saved)} there and {len(now)} here"]
    found = []
    for name, before in saved.items():
        here = now.get(name, {})
        differing = [key for key in here if key in before and before[key] != here[key]]
        found += [f"{name} has {key} {before[key]} there and {here[key]} here" for key in differing[:1]]
    return found


def _identity(path: str) -> dict[str, int | str]:
    manifest = read_manifest(path)
    if manifest is None:
        index, idx = read_index(path), checksum(Path(f"{path}.idx"))
        found: dict[str, int | str] = {"documents": index.documents, "tokens": index.tokens}
        found |= {"bin_bytes": os.path.getsize(f"{path}.bin")}
    else:
        idx = manifest.idx
        found = {"documents": manifest.documents, "tokens": manifest.tokens}
        found |= {"bin_bytes": manifest.bin.num_bytes, "bin_xxh3_128": manifest.bin.xxh3_128}
        found |= {TOKENIZER: manifest.fingerprint}
    return found | {"idx_bytes": idx.num_bytes, "idx_xxh3_128": idx.xxh3_128}


def _check_prepared(path: str, manifest: DataManifest, spec: TokenizerSpec) -> None:
    for suffix, file in ((".bin", manifest.bin), (".idx", manifest.idx)):
        num_bytes = os.path.getsize(path + suffix)
        if num_bytes != file.num_bytes:
            raise ConfigError(
                f"{path}{suffix} has {num_bytes} bytes, and {path}.json says {file.num_bytes}; the three files belong "
                "together; copy them again, or prepare the data again."
            )
    if not _is_tokenizer_of(spec, manifest):
        raise ConfigError(
            f"data.tokenizer={spec}, but {path} was prepared with {manifest.tokenizer} ({manifest.fingerprint}); a run "
            f"reads the tokens of one tokenizer; set data.tokenizer={manifest.tokenizer}, or prepare the data with "
            "this one."
        )


def _is_tokenizer_of(spec: TokenizerSpec, manifest: DataManifest) -> bool:
    """Compare contents where the tokenizer's file is on this machine, names where it is not."""
    fingerprint = file_fingerprint(spec)
    if fingerprint is not None:
        return f"{manifest.fingerprint}:".startswith(f"{fingerprint}:")
    # An encoding of tiktoken has its name in the fingerprint, whatever file it came from.
    return manifest.tokenizer == str(spec) or manifest.fingerprint.startswith(f"{spec}:")


def _check_foreign(path: str, size: int) -> None:
    index, num_bytes = read_index(path), os.path.getsize(f"{path}.bin")
    dtype = np.dtype(index.dtype)
    if num_bytes < index.tokens * dtype.itemsize or not np.issubdtype(dtype, np.integer):
        raise ConfigError(
            f"{path}.bin has {num_bytes} bytes, but {path}.idx lists {index.tokens} tokens of {dtype}; the two belong "
            "together and hold whole numbers; copy them again, or make the data again."
        )
    if not index.tokens:
        return
    tokens = np.memmap(f"{path}.bin", dtype=dtype, mode="r", shape=(index.tokens,))
    per_block = _BLOCK_BYTES // dtype.itemsize
    num_blocks = -(-tokens.size // per_block)
    seen = np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, SCANNED_BYTES // _BLOCK_BYTES)).astype(np.int64))
    for block in seen.tolist():
        part = tokens[block * per_block : (block + 1) * per_block]
        check_tokens(path, part, size)


def check_tokens(path: str, tokens: np.ndarray, size: int) -> None:
    """Refuse token ids that have no embedding.

    Args:
        path: of the data, for the message.
        tokens: `[n]`, at least one.
        size: number of embeddings.
    """
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= size:
        raise ConfigError(
            f"{path} holds the token {most if most >= size else least}, and the vocabulary has {size}; ids are from 0 "
            f"to {size - 1}; set data.tokenizer to the one that made the data, or model.vocab_size to its size."
        )
