"""The manifest of a result before it is made, and what of it says that two commands are the same."""

from importlib import metadata
from typing import Any

from mempar import __version__
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.data.manifest import DataManifest, FileSum
from mempar.tools.prepare.index import token_dtype

_NOT_YET = FileSum(num_bytes=0, xxh3_128="")


def describe(tokenizer: str, encoder: Encoder, inputs: list[dict[str, Any]], options: dict[str, Any]) -> DataManifest:
    """Return the manifest as far as it is known before anything is read.

    Args:
        tokenizer: its name.
        encoder: the same, loaded.
        inputs: what identifies each file.
        options: how documents are found and encoded.
    """
    libraries = {name: metadata.version(name) for name in ("numpy", "xxhash")}
    return DataManifest(
        tokenizer=tokenizer,
        fingerprint=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        dtype=token_dtype(encoder.vocab_size).name,
        documents=0,
        tokens=0,
        largest_token=-1,
        bin=_NOT_YET,
        idx=_NOT_YET,
        inputs=inputs,
        options=options,
        versions={"mempar": __version__, "tokenizer": encoder.version, **libraries},
    )


def command_of(manifest: DataManifest) -> dict[str, Any]:
    """Return what makes a command the same as another."""
    return {
        "tokenizer": manifest.fingerprint,
        "inputs": manifest.inputs,
        "options": manifest.options,
        "versions": {name: manifest.versions[name] for name in ("mempar", "tokenizer")},
    }
