"""Hugging Face tokenizers: a tokenizer.json, and the end of document that its neighbours name."""

import importlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import unusable
from mempar.runtime.data.tokenizer import TokenizerSpec

_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
)


class HfEncoder:
    """A tokenizer.json.

    The end-of-document token is `eos_token` of a tokenizer_config.json beside it, else a special token with one of
    the usual names (`<|endoftext|>`, `</s>`, ...), else one after the vocabulary.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        library = spec.import_library("tokenizers")
        path, config = _files(spec)
        try:
            content = path.read_bytes()
            description = {"added_tokens": [], **json.loads(content)}
            self._whole: Any = library.Tokenizer.from_str(content.decode())
            end = _configured_end(config)
            vocabulary = self._whole.get_vocab(with_added_tokens=True)
            size = max(vocabulary.values()) + 1
            specials = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
            end = next((name for name in (end, *_ENDS) if name in (vocabulary if name == end else specials)), None)
            if end is not None:
                specials[end] = vocabulary[end]
            self._plain: Any = library.Tokenizer.from_str(json.dumps(_without_specials(description, specials)))
        except Exception as error:
            raise unusable(spec, error) from None
        self.eod, self.vocab_size = (size, size + 1) if end is None else (vocabulary[end], size)
        self.fingerprint = f"hf:{xxhash.xxh3_128_hexdigest(content)}:{self.eod}"
        self.version = f"tokenizers {library.__version__}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See Encoder."""
        return [found.ids for found in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Encoder."""
        return self._whole.decode([int(token) for token in tokens if token != self.eod], skip_special_tokens=False)


def _without_specials(description: dict[str, Any], specials: dict[str, int]) -> dict[str, Any]:
    """The tokenizer that cannot make special tokens out of text, and neither cuts nor pads.

    Args:
        description: content of tokenizer.json.
        specials: ids of special tokens.
    """
    model = description["model"]
    # Nobody can write this name into a text. The entries stay, because the ids of others count on their places.
    secret = secrets.token_hex(16)
    hidden = {token: f"{secret} {number}" for token, number in specials.items()}
    words = model["vocab"]
    if isinstance(words, dict):
        words = {hidden.get(token, token): number for token, number in words.items()}
    else:
        words = [[hidden.get(token, token), score] for token, score in words]
    model = {**model, "vocab": words}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    added = [
        {**token, "content": hidden.get(token["content"], token["content"])} for token in description["added_tokens"]
    ]
    return {
        **description,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _files(spec: TokenizerSpec) -> tuple[Path, Path | None]:
    """Paths of tokenizer.json and, where there is one, of tokenizer_config.json."""
    path = spec.path
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        config = path.with_name("tokenizer_config.json")
        return path, config if config.is_file() else None
    is_json = spec.source.endswith(".json")
    # A name on the hub has at most one slash and is no file's.
    if spec.path.is_dir() or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1 or is_json:
        raise ConfigError(
            f"{path} does not exist, which the tokenizer {spec} names; a tokenizer is read from a tokenizer.json or a "
            "directory that holds one; correct the path."
        )
    try:
        hub = importlib.import_module("huggingface_hub")
        path = Path(hub.hf_hub_download(spec.source, "tokenizer.json"))
    except Exception as error:
        raise unusable(spec, error) from None
    try:
        return path, Path(hub.hf_hub_download(spec.source, "tokenizer_config.json"))
    except hub.errors.EntryNotFoundError:
        return path, None
    except Exception as error:
        raise unusable(spec, error) from None


def _configured_end(config: Path | None) -> str | None:
    """The `eos_token` of tokenizer_config.json: a string, or an object with its content."""
    if config is None:
        return None
    token = json.loads(config.read_bytes()).get("eos_token")
    return token["content"] if isinstance(token, dict) else token
