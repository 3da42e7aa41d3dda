"""Tokenizers, as far as training needs them: how many tokens there are, and what Megatron asks.

Nothing here imports torch.
"""

from dataclasses import dataclass

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig

# bytes 0..255 and an end-of-document token
BYTE_VOCAB = 257


@dataclass(frozen=True)
class ByteTokenizer:
    """What Megatron's data sets ask of a tokenizer."""

    vocab_size: int = BYTE_VOCAB
    eod: int = BYTE_VOCAB - 1
    # Documents are packed, never padded: a number that no token has.
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What distinguishes cached sample indices of different tokenizers."""
        return {"class": "ByteTokenizer"}

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        """Megatron asks for it; there are none."""
        return {}


def vocab_size(run: RunConfig) -> int:
    """Tokens of the run's tokenizer.

    Raises:
        ConfigError: for an unknown tokenizer, and for a model whose vocabulary is smaller.
    """
    if run.data.tokenizer != "byte":
        raise ConfigError(
            f"data.tokenizer={run.data.tokenizer} is not known; the tokenizers are: byte; use one of these."
        )
    if 0 < run.model.vocab_size < BYTE_VOCAB:
        raise ConfigError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the {BYTE_VOCAB} tokens of data.tokenizer="
            f"{run.data.tokenizer}; every token needs an embedding; use 0 to take the tokenizer's size."
        )
    return BYTE_VOCAB
