"""The files of a run's tokenizer in an exported model.

`byte` becomes a tokenizer.json that does the same, and of Hugging Face's own the files are copied. SentencePiece and
tiktoken split text in ways of their own: their files go along, with a note that says what reads them. Nothing is
fetched: which tokenizer it is says a checkpoint, and that may come from anywhere. Nothing here imports torch.
"""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.tokenizer import BYTE_VOCAB, TokenizerSpec, parse_spec

END = "<|endoftext|>"
# Version 4 of transformers would make token_type_ids too, which these models do not take.
_INPUTS = ["input_ids", "attention_mask"]
# What stands beside a tokenizer.json, as far as it says something about text.
_NEIGHBOURS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer, as far as it can be exported.

    Attributes:
        files: contents by name.
        eod: the token that ends documents; None where that is not known.
        vocab_size: tokens that there are; None where that is not known.
        note: what whoever uses the model has to know; empty where AutoTokenizer does all.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    eod: int | None = None
    vocab_size: int | None = None
    note: str = ""


def tokenizer_files(name: str, max_length: int) -> TokenizerFiles:
    """Collect a tokenizer's files.

    Args:
        name: as in `data.tokenizer`.
        max_length: tokens that the model was trained on at a time.

    Returns:
        The files; none, and a note why, where the tokenizer cannot be loaded here.

    Raises:
        ConfigError: when the name is none of the known forms.
    """
    spec = parse_spec(name)
    if spec.kind == "byte":
        return TokenizerFiles(files=byte_files(max_length), eod=BYTE_VOCAB - 1, vocab_size=BYTE_VOCAB)
    try:
        return _hf_files(spec) if spec.kind == "hf" else _other_files(spec)
    except ConfigError as error:
        return TokenizerFiles(note=f"The tokenizer is not here: {error}")


def byte_files(max_length: int) -> dict[str, bytes]:
    """The tokenizer `byte` in Hugging Face's format: one token a byte of UTF-8, and one that ends documents."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": BYTE_VOCAB - 1, "content": END, "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: number for number, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": _INPUTS,
    }
    return {"tokenizer.json": _json(description), "tokenizer_config.json": _json(config)}


def _byte_characters() -> list[str]:
    """The characters that byte-level tokenizers write for the 256 bytes: themselves where they can be seen."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(number if number in visible else next(others)) for number in range(256)]


def _hf_files(spec: TokenizerSpec) -> TokenizerFiles:
    path = spec.path / "tokenizer.json" if spec.path.is_dir() else spec.path
    if not path.is_file():
        path = _cached(spec)
    # The encoder reads the file as a tokenizer: nothing else is copied, whatever a checkpoint names.
    encoder = load_encoder(TokenizerSpec("hf", str(path)))
    others = [other for name in _NEIGHBOURS if (other := path.with_name(name)).is_file()]
    files = {"tokenizer.json": path.read_bytes()} | {other.name: other.read_bytes() for other in others}
    files.setdefault(
        "tokenizer_config.json", _json({"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": _INPUTS})
    )
    return TokenizerFiles(files=files, eod=encoder.eod, vocab_size=encoder.vocab_size)


def _cached(spec: TokenizerSpec) -> Path:
    """The tokenizer.json of a name on the hub, if it was fetched before."""
    try:
        hub = importlib.import_module("huggingface_hub")
        path = Path(hub.hf_hub_download(spec.source, "tokenizer.json", local_files_only=True))
    except Exception:
        raise ConfigError(
            f"{spec} is neither a file nor in the hub's cache on the machine that exported the model, and an export "
            "fetches nothing; load the tokenizer from where it is."
        ) from None
    return path


def _other_files(spec: TokenizerSpec) -> TokenizerFiles:
    library = spec.kind
    if not spec.path.is_file():
        raise ConfigError(f"{spec} is no file; the library {library} reads it; load it with that.")
    # The name of merge ranks may decide how text is split; no other may stand among the files of a model.
    ranks = spec.path.name if spec.path.suffix == ".tiktoken" else "tokenizer.tiktoken"
    name = "tokenizer.model" if spec.kind == "sentencepiece" else ranks
    encoder = load_encoder(spec)
    note = (
        f"The tokenizer is {name}, which the library {library} reads and AutoTokenizer does not; token {encoder.eod} "
        "ends documents."
    )
    files = {name: spec.path.read_bytes()}
    return TokenizerFiles(files=files, eod=encoder.eod, vocab_size=encoder.vocab_size, note=note)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
