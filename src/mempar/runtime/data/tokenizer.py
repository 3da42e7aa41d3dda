"""Tokenizers, as far as training needs them: their names, how many tokens there are, and what Megatron asks.

A tokenizer is named the same way in `data.tokenizer` and on the command line of `mempar prepare`:

    byte                     256 bytes and an end-of-document token
    hf:PATH_OR_NAME          Hugging Face: a tokenizer.json, a directory that holds one, or a name on the hub
    sentencepiece:FILE       a SentencePiece .model
    tiktoken:NAME_OR_FILE    an encoding of tiktoken, or a .tiktoken file of merge ranks

Nothing here imports torch, and no tokenizer library is loaded where prepared data say how many tokens there are.
`encoders.py` turns text into tokens.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.manifest import read_manifest

# bytes 0..255 and an end-of-document token
BYTE_VOCAB = 257
GRAMMAR = ("byte", "hf:PATH_OR_NAME", "sentencepiece:FILE", "tiktoken:NAME_OR_FILE")
_KINDS = tuple(form.partition(":")[0] for form in GRAMMAR)


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's name: its kind, and the file or name that says which of that kind."""

    kind: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.source}" if self.source else self.kind

    @property
    def path(self) -> Path:
        """The source as a path, whether or not it exists."""
        return Path(self.source).expanduser()

    def missing_file(self) -> ConfigError:
        """The error to raise where the source must be a file and is none."""
        return ConfigError(
            f"{self.path} does not exist, which the tokenizer {self} names; a tokenizer is read from its file; "
            "correct the path."
        )

    def import_library(self, module: str) -> Any:
        """Import the library that this kind of tokenizer needs.

        Raises:
            ConfigError: when it is not installed.
        """
        try:
            return importlib.import_module(module)
        except ImportError:
            raise ConfigError(
                f"the tokenizer {self} needs the package `{module}`, which is not installed; libraries of tokenizers "
                "and file formats come with an extra; pip install 'mempar[data]'."
            ) from None


def parse_spec(text: str, setting: str = "data.tokenizer") -> TokenizerSpec:
    """Read a tokenizer's name.

    Args:
        text: what the user wrote.
        setting: where, for the message.

    Raises:
        ConfigError: when it is none of the known forms.
    """
    kind, colon, source = text.partition(":")
    if kind not in _KINDS or (kind == "byte") == bool(colon) or (colon and not source):
        raise ConfigError(f"{setting}={text} is not known; the tokenizers are: {', '.join(GRAMMAR)}; use one of these.")
    return TokenizerSpec(kind, source)


@dataclass(frozen=True, kw_only=True)
class MegatronTokenizer:
    """What Megatron's data sets ask of a tokenizer; they read tokens, and need none of their meanings.

    Attributes:
        name: as in `data.tokenizer`.
        vocab_size: number of tokens.
    """

    name: str
    vocab_size: int
    # Neither the end of a document nor padding is treated in a way of its own: numbers that no token has, and two of
    # them, or Megatron warns that they collide.
    eod: int = -2
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What distinguishes cached sample indices of different tokenizers."""
        return {"class": "MegatronTokenizer", "name": self.name}

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        """Megatron asks for it; there are none."""
        return {}


def vocab_size(run: RunConfig) -> int:
    """Tokens of the run's tokenizer, its end-of-document token included.

    Prepared data know it. Without them it is `model.vocab_size`, and only where that is 0 too is the tokenizer loaded.

    Raises:
        ConfigError: for an unknown tokenizer, one that cannot be loaded, and a model whose vocabulary is smaller.
    """
    size = _vocab_size(run, parse_spec(run.data.tokenizer))
    if 0 < run.model.vocab_size < size:
        raise ConfigError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the {size} tokens of data.tokenizer="
            f"{run.data.tokenizer}; every token needs an embedding; use 0 to take the tokenizer's size."
        )
    return size


def _vocab_size(run: RunConfig, spec: TokenizerSpec) -> int:
    if spec.kind == "byte":
        return BYTE_VOCAB
    for path in (*run.data.paths, *run.data.heldout_paths):
        manifest = read_manifest(path)
        if manifest is not None:
            return manifest.vocab_size
    if run.model.vocab_size:
        return run.model.vocab_size
    from mempar.runtime.data.encoders import load_encoder

    return load_encoder(spec).vocab_size
