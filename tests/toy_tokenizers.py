"""Tiny tokenizers of every kind, made here: nothing is fetched."""

import base64
import io
import json
from pathlib import Path

import sentencepiece
import tokenizers

AWKWARD = [
    "plain words, and more words",
    "two  spaces, a\ttab and\nlines\r\n\n at the end \n",
    "Grüße, Ελληνικά, русский, 日本語, العربية",
    "👩‍👩‍👧 e\u0301 \u200b \ufeff \U0010ffff \x00 \x7f",
    "<|endoftext|></s><s><unk>[UNK]<pad> <|endoftext|>",
    " ",
    "x",
]
TRAINING_TEXT = ["the memory layer reads the rows of a table, and the table is large"] * 20 + AWKWARD[:4]
END = "<|endoftext|>"


def byte_level(folder: Path, *, end: str | None = END, config: object = None) -> Path:
    """A directory with the tokenizer.json of a byte-level BPE of 300 tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end] if end else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def unigram(path: Path) -> Path:
    """A Unigram model in which the end of a document is a piece like others, as T5's is."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *[(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz</>"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<extra>"])
    tokenizer.add_tokens(["ordinary"])
    tokenizer.save(str(path))
    return path


def sentencepiece_model(path: Path, *, eos: bool = True) -> Path:
    """A model that keeps text as it is: no normalisation, bytes for what it does not know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        eos_id=2 if eos else -1,
        minloglevel=3,
    )
    path.write_bytes(model.getvalue())
    return path


def ranks(path: Path) -> Path:
    """A .tiktoken file: the bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the", b"me", b"\xe6\x97"]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def all_specs(folder: Path) -> list[str]:
    """One tokenizer of every kind."""
    return [
        "byte",
        f"hf:{byte_level(folder / 'hf')}",
        f"sentencepiece:{sentencepiece_model(folder / 'toy.model')}",
        f"tiktoken:{ranks(folder / 'toy.tiktoken')}",
    ]
