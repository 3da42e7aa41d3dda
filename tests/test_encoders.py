"""Tokenizers of every kind: text comes back, special tokens never come out of text, every kind ends documents."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.hf_encoder import HfEncoder
from mempar.runtime.data.tokenizer import parse_spec
from toy_tokenizers import AWKWARD, END, all_specs, byte_level, ranks, sentencepiece_model, unigram


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {spec.partition(":")[0]: spec for spec in all_specs(tmp_path_factory.mktemp("tokenizers"))}


def load(spec: str) -> Encoder:
    return load_encoder(parse_spec(spec))


@pytest.mark.parametrize("kind", ["byte", "hf", "sentencepiece", "tiktoken"])
def test_text_comes_back_and_holds_no_special_token(specs: dict[str, str], kind: str) -> None:
    encoder = load(specs[kind])
    for text, tokens in zip(AWKWARD, encoder.encode(AWKWARD), strict=True):
        assert encoder.decode(tokens) == text
        assert encoder.eod not in list(tokens)
        assert max(tokens) < encoder.vocab_size
    assert encoder.eod < encoder.vocab_size
    assert encoder.decode([encoder.eod]) == ""


def test_hugging_face_tokens_are_those_of_the_library(specs: dict[str, str]) -> None:
    encoder = load(specs["hf"])
    library = tokenizers.Tokenizer.from_file(specs["hf"].removeprefix("hf:") + "/tokenizer.json")
    plain = [text for text in AWKWARD if END not in text]
    assert encoder.encode(plain) == [library.encode(text).ids for text in plain]
    assert (encoder.eod, encoder.vocab_size) == (library.token_to_id(END), library.get_vocab_size())


def test_cutting_and_padding_of_a_tokenizer_file_are_left_alone(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "hf") / "tokenizer.json"
    plain = load(f"hf:{path}").encode(AWKWARD)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.enable_truncation(3)
    library.enable_padding(length=5)
    library.save(str(path))
    assert load(f"hf:{path}").encode(AWKWARD) == plain


def test_end_of_document_is_the_configured_one_else_a_usual_one_else_appended(tmp_path: Path) -> None:
    named = load(f"hf:{byte_level(tmp_path / 'named')}")
    appended = load(f"hf:{byte_level(tmp_path / 'appended', end=None)}")
    assert (appended.eod, appended.vocab_size) == (300, 301)
    for number, config in enumerate([{"eos_token": "<stop>"}, {"eos_token": {"content": "<stop>"}}]):
        configured = load(f"hf:{byte_level(tmp_path / f'configured{number}', end='<stop>', config=config)}")
        assert (configured.eod, configured.vocab_size) == (named.eod, 300)
        assert configured.eod not in configured.encode(["<stop>"])[0]
    assert named.fingerprint != appended.fingerprint


def test_pieces_of_the_vocabulary_that_are_special_do_not_come_out_of_text(tmp_path: Path) -> None:
    path = unigram(tmp_path / "tokenizer.json")
    encoder = load(f"hf:{path}")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    # What the library's own switch leaves open: the piece is found in the text.
    assert encoder.eod == 1 in library.encode("ab</s>").ids
    (tokens,) = encoder.encode(["ab</s><unk><extra>ordinary"])
    assert encoder.decode(tokens) == "ab</s><unk><extra>ordinary"
    assert not {0, 1, library.token_to_id("<extra>")} & set(tokens)
    assert library.token_to_id("ordinary") in tokens


def test_sentencepiece_without_an_end_gets_one(tmp_path: Path) -> None:
    with_end = load(f"sentencepiece:{sentencepiece_model(tmp_path / 'a.model')}")
    without = load(f"sentencepiece:{sentencepiece_model(tmp_path / 'b.model', eos=False)}")
    assert with_end.eod == 2
    assert without.eod == without.vocab_size - 1


def test_merge_ranks_are_split_by_the_name_of_their_file(tmp_path: Path) -> None:
    toy = load(f"tiktoken:{ranks(tmp_path / 'toy.tiktoken')}")
    assert (toy.eod, toy.vocab_size) == (262, 263)
    known = load(f"tiktoken:{ranks(tmp_path / 'o200k_base.tiktoken')}")
    assert (known.eod, known.vocab_size) == (199999, 200019)
    assert toy.fingerprint != known.fingerprint
    assert toy.encode(["the the"])[0].tolist() == [257, 259]


def test_fingerprint_follows_the_content_and_not_the_place(specs: dict[str, str], tmp_path: Path) -> None:
    for kind in ("hf", "sentencepiece", "tiktoken"):
        source = Path(specs[kind].partition(":")[2])
        moved = tmp_path / f"moved{source.suffix}"
        moved.write_bytes((source / "tokenizer.json" if kind == "hf" else source).read_bytes())
        assert load(f"{kind}:{moved}").fingerprint == load(specs[kind]).fingerprint
    assert len({load(spec).fingerprint for spec in specs.values()}) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:./nowhere", "does not exist"),
        ("hf:{tmp}", "does not exist"),
        ("sentencepiece:nowhere.model", "does not exist"),
        ("tiktoken:nowhere", "the encodings are: .*cl100k_base"),
        ("hf:{tmp}/broken.json", "cannot be loaded"),
        ("sentencepiece:{tmp}/broken.json", "cannot be loaded"),
        ("tiktoken:{tmp}/broken.json", "cannot be loaded"),
        ("tiktoken:{tmp}/short.tiktoken", "lacks tokens for some of the 256 bytes"),
    ],
)
def test_missing_and_damaged_tokenizers_are_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "broken.json").write_text("{broken")
    (tmp_path / "short.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(ConfigError, match=message):
        load(spec.format(tmp=tmp_path))


@pytest.mark.parametrize("spec", ["gpt2", "hf", "hf:", "byte:", "bytes", "tiktoken", "", "HF:x"])
def test_unknown_names_are_refused_with_the_known_forms(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer=.*byte, hf:PATH_OR_NAME, sentencepiece:FILE, tiktoken:NAME_OR"):
        parse_spec(spec, "--tokenizer")


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "tiktoken"])
def test_missing_library_is_named_with_its_extra(
    specs: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"hf": "tokenizers"}.get(kind, kind), None)
    with pytest.raises(ConfigError, match=r"mempar\[data\]"):
        load(specs[kind])


def test_names_on_the_hub_are_fetched_with_their_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = byte_level(tmp_path / "hub", config={"eos_token": END})
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert HfEncoder(parse_spec("hf:some/name-1.5")).fingerprint == load(f"hf:{folder}").fingerprint
    assert asked == [("some/name-1.5", "tokenizer.json"), ("some/name-1.5", "tokenizer_config.json")]

    def no_network(name: str, file: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(no network\).*name the file"):
        load("hf:some/name-1.5")
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": END}
