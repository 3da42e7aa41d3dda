"""Text to tokens and back, with the libraries of the tokenizers; each is imported when a tokenizer needs it.

Text is text: what looks like a special token in it is encoded letter by letter, so that no document can end itself
or open a turn. Only `mempar prepare` adds the end-of-document token, after each document. A tokenizer without one gets
one after its vocabulary. Nothing here imports torch.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from mempar.errors import ConfigError
from mempar.runtime.data.tokenizer import BYTE_VOCAB, TokenizerSpec

# Splits of text into words, by the name of the encoding, as published with tiktoken (MIT licence), and the ids of
# <|endoftext|> and of the last token.
_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_RANKS = {
    "r50k_base": (_GPT2_SPLIT, 50256, 50257),
    "p50k_base": (_GPT2_SPLIT, 50256, 50281),
    "cl100k_base": (_CL100K_SPLIT, 100257, 100277),
    "o200k_base": (_O200K_SPLIT, 199999, 200019),
}
_END_OF_TEXT = "<|endoftext|>"


class Encoder(Protocol):
    """One tokenizer.

    Attributes:
        vocab_size: ids are below it; `eod` is counted.
        eod: the end-of-document token.
        fingerprint: equal where texts are encoded alike, whatever the files are called.
        version: of the library that encodes.
    """

    vocab_size: int
    eod: int
    fingerprint: str
    version: str

    def encode(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Tokens of each text, without an end of document."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; ends of documents are left out."""
        ...


def load_encoder(spec: TokenizerSpec) -> Encoder:
    """Load a tokenizer.

    Raises:
        ConfigError: when its file or its library is missing or unusable.
    """
    if spec.kind == "hf":
        from mempar.runtime.data.hf_encoder import HfEncoder

        return HfEncoder(spec)
    return {"byte": ByteEncoder, "sentencepiece": SentencePieceEncoder, "tiktoken": TiktokenEncoder}[spec.kind](spec)


def file_fingerprint(spec: TokenizerSpec) -> str | None:
    """What the fingerprint of a tokenizer begins with, from its file alone; None where there is no file.

    Raises:
        ConfigError: for a file that is no .tiktoken file.
    """
    path = spec.path / "tokenizer.json" if spec.kind == "hf" and spec.path.is_dir() else spec.path
    if spec.kind == "byte":
        return str(spec)
    if not path.is_file():
        return None
    if spec.kind == "tiktoken":
        return _ranks_fingerprint(_split_name(spec), _read_ranks(spec))
    return f"{spec.kind}:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


class ByteEncoder:
    """UTF-8 bytes."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.vocab_size, self.eod = BYTE_VOCAB, BYTE_VOCAB - 1
        self.fingerprint, self.version = str(spec), "byte"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """See Encoder."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Encoder."""
        return bytes(int(token) for token in tokens if token < self.eod).decode(errors="replace")


class SentencePieceEncoder:
    """A SentencePiece model; what it guarantees of the text is its own normalisation's affair."""

    def __init__(self, spec: TokenizerSpec) -> None:
        library = spec.import_library("sentencepiece")
        if not spec.path.is_file():
            raise spec.missing_file()
        model = spec.path.read_bytes()
        try:
            self._model: Any = library.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise unusable(spec, error) from None
        size, eos = self._model.vocab_size(), self._model.eos_id()
        # Control pieces never come out of text, pieces of other kinds may.
        has_end = eos >= 0 and self._model.is_control(eos)
        self.eod, self.vocab_size = (eos, size) if has_end else (size, size + 1)
        self.fingerprint = f"sentencepiece:{xxhash.xxh3_128_hexdigest(model)}"
        self.version = f"sentencepiece {library.__version__}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See Encoder."""
        return self._model.encode(texts, out_type=int, num_threads=1)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Encoder."""
        return self._model.decode([int(token) for token in tokens if token != self.eod])


class TiktokenEncoder:
    """An encoding of tiktoken by its name, or merge ranks from a file.

    A file that is called like a known encoding (cl100k_base.tiktoken) is split into words as that one is; any other as
    cl100k_base, with an end-of-document token after its last rank.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        library = spec.import_library("tiktoken")
        if spec.path.is_file():
            name, ranks = _split_name(spec), _read_ranks(spec)
            size = max(ranks.values()) + 1
            split, self.eod, self.vocab_size = _KNOWN_RANKS.get(name, (_CL100K_SPLIT, size, size + 1))
            if self.eod in ranks.values() or size > self.vocab_size:
                raise unusable(
                    spec, ValueError(f"{name} has {self.vocab_size} tokens and ends documents by {self.eod}")
                )
            self._encoding: Any = library.Encoding(
                name, pat_str=split, mergeable_ranks=ranks, special_tokens={_END_OF_TEXT: self.eod}
            )
        else:
            self._encoding = _published(library, spec)
            ranks, size = self._encoding._mergeable_ranks, self._encoding.n_vocab
            end = self._encoding._special_tokens.get(_END_OF_TEXT)
            self.eod, self.vocab_size = (size, size + 1) if end is None else (end, size)
            name = self._encoding.name
        self.fingerprint = _ranks_fingerprint(name, ranks)
        self.version = f"tiktoken {library.__version__}"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """See Encoder."""
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Encoder."""
        return self._encoding.decode([int(token) for token in tokens if token != self.eod])


def unusable(spec: TokenizerSpec, error: Exception) -> ConfigError:
    """The error to raise for a tokenizer whose file or name is of no use."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"the tokenizer {spec} cannot be loaded ({reason}); it must be a file of its kind, or a known name that "
        "can be downloaded or is in its cache; name the file of a whole tokenizer."
    )


def _split_name(spec: TokenizerSpec) -> str:
    return spec.path.stem if spec.path.stem in _KNOWN_RANKS else "split as cl100k_base"


def _ranks_fingerprint(name: str, ranks: dict[bytes, int]) -> str:
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items()))
    return f"tiktoken:{name}:{xxhash.xxh3_128_hexdigest(lines)}"


def _read_ranks(spec: TokenizerSpec) -> dict[bytes, int]:
    """Merge ranks of a .tiktoken file: a token in base64 and its rank on each line."""
    ranks = {}
    try:
        for line in Path(spec.path).read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise unusable(spec, error) from None
    if not set(range(256)) <= {token[0] for token in ranks if len(token) == 1}:
        raise unusable(spec, ValueError("it lacks tokens for some of the 256 bytes"))
    return ranks


def _published(library: Any, spec: TokenizerSpec) -> Any:
    if spec.source not in library.list_encoding_names():
        raise ConfigError(
            f"tiktoken:{spec.source} is neither a file nor a known encoding; the encodings are: "
            f"{', '.join(library.list_encoding_names())}; use one of these, or the path of a .tiktoken file."
        )
    try:
        return library.get_encoding(spec.source)
    except Exception as error:
        # Whatever the network library raises where there is no network.
        raise unusable(spec, error) from None
