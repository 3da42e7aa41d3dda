"""What a model of transformers' says that no run of ours does: its special tokens, and how long texts may be.

It goes along in what describes a checkpoint (`Source.about`), so that an export says it again. Both are untrusted: what
is no token of the model is left out. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# In `Source.about`.
KEY = "huggingface"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LENGTH = "max_position_embeddings"
# A Llama's own, which its files may leave out.
_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, LENGTH: 2048}
_MOST_TOKENS, _LONGEST = 64, 1 << 53


@dataclass(frozen=True, kw_only=True)
class KeptSettings:
    """Settings by their names there.

    Attributes:
        config: of config.json.
        generation: of generation_config.json.
    """

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


def settings_to_keep(config: Mapping[str, Any], generation: Mapping[str, Any], vocab_rows: int) -> dict[str, Any]:
    """What `Source.about` has of a model.

    Args:
        config: the content of config.json.
        generation: the content of generation_config.json, if there is one.
        vocab_rows: rows of the embedding.
    """
    found = {name: config.get(name, _DEFAULTS.get(name)) for name in (*TOKENS, LENGTH)}
    return {KEY: {"config": _valid(found, vocab_rows), "generation": _valid(generation, vocab_rows)}}


def kept_settings(about: Mapping[str, Any], vocab_rows: int, *, tokens: bool) -> KeptSettings:
    """What an export says again.

    Args:
        about: what describes a source.
        vocab_rows: rows of the embedding.
        tokens: whether the tokenizer is still the model's own.
    """
    kept = about.get(KEY)
    sections = [kept.get(name) if isinstance(kept, Mapping) else None for name in ("config", "generation")]
    config, generation = (_valid(part, vocab_rows) if isinstance(part, Mapping) else {} for part in sections)
    if tokens:
        return KeptSettings(config=config, generation=generation)
    return KeptSettings(config={name: value for name, value in config.items() if name == LENGTH})


def _valid(section: Mapping[str, Any], vocab_rows: int) -> dict[str, Any]:
    kept = {name: section[name] for name in TOKENS if _are_tokens(section.get(name), vocab_rows, name)}
    length = section.get(LENGTH)
    return {**kept, LENGTH: length} if type(length) is int and 0 < length < _LONGEST else kept


def _are_tokens(value: Any, vocab_rows: int, name: str) -> bool:
    # Several tokens may end a text.
    several = name == "eos_token_id" and isinstance(value, list)
    tokens = value if several else [value]
    return 0 < len(tokens) <= _MOST_TOKENS and all(type(token) is int and 0 <= token < vocab_rows for token in tokens)
