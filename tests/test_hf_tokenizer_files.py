"""Tokenizers in exported models: the same tokens, or a note that says what reads them; nothing else is copied."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.tokenizer import parse_spec
from mempar.tools.convert.hf.tokenizer_files import byte_files, tokenizer_files
from toy_tokenizers import AWKWARD, byte_level, ranks, sentencepiece_model


def written(files: dict[str, bytes], root: Path) -> Any:
    for name, content in files.items():
        (root / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(root)


@pytest.mark.parametrize("config", [None, {"eos_token": "<|endoftext|>", "chat_template": "x"}])
def test_tokenizer_of_hugging_face_is_copied(config: Any, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "own", config=config)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_data.txt").write_text("secret")
    found = tokenizer_files(f"hf:{folder}", 64)
    assert found.files.keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not found.note
    encoder = load_encoder(parse_spec(f"hf:{folder}"))
    assert found.eod == encoder.eod
    (tmp_path / "export").mkdir()
    tokenizer = written(found.files, tmp_path / "export")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    # The name of the special token is the token there.
    plain = [text for text in AWKWARD if "<|" not in text]
    assert [tokenizer(text).input_ids for text in plain] == [list(ids) for ids in encoder.encode(plain)]
    # The fingerprint of prepared data stays the same.
    assert load_encoder(parse_spec(f"hf:{tmp_path / 'export'}")).fingerprint == encoder.fingerprint


def test_byte_tokenizer_has_the_tokens_of_ours(tmp_path: Path) -> None:
    tokenizer = written(byte_files(128), tmp_path)
    for text in AWKWARD:
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode()) or "<|endoftext|>" in text
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|endoftext|>").input_ids == [97, 256]
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_other_tokenizers_go_along_with_a_note(kind: str, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        path, name = sentencepiece_model(tmp_path / "own.model"), "tokenizer.model"
    else:
        path, name = ranks(tmp_path / "config.json"), "tokenizer.tiktoken"
    found = tokenizer_files(f"{kind}:{path}", 64)
    assert found.files == {name: path.read_bytes()}
    assert found.eod == load_encoder(parse_spec(f"{kind}:{path}")).eod
    assert f"{name}, which the library {kind} reads" in found.note


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "tiktoken"])
def test_files_that_are_no_tokenizers_are_not_copied(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / ("secret.json" if kind == "hf" else "secret")
    secret.write_text(json.dumps({"key": "hush"}))
    found = tokenizer_files(f"{kind}:{secret}", 64)
    assert not found.files and found.eod is None
    assert "cannot be loaded" in found.note


@pytest.mark.parametrize("name", ["hf:somebody/model", "hf:/nowhere/at/all", "tiktoken:gpt2", "sentencepiece:gone"])
def test_tokenizers_that_are_not_here_are_not_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    found = tokenizer_files(name, 64)
    assert not found.files and found.note.startswith("The tokenizer is not here: ")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=words is not known"):
        tokenizer_files("words", 64)
