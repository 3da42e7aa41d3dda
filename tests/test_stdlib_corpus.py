"""The standard-library corpus: the same every time, honest about what is held out, and exact on disk."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mempar.errors import ConfigError
from mempar.runtime.data.manifest import read_manifest
from mempar.runtime.mcore import IndexedDataset
from mempar.tools import stdlib_corpus

# Controls and accents, a text that is long, and one (named as held out) that training has too.
_COPIED = b"the same text in training and held-out " * 3


def _some_text(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(64, 4000))).decode("latin-1").encode()


def _some_documents() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    names = [f"stdlib/{index}.py" for index in range(300)]
    heldout_name = next(name for name in names if stdlib_corpus.is_heldout(name))
    yield "stdlib/all_characters", bytes(range(256)).decode("latin-1").encode()
    for name in names:
        yield name, _COPIED if name == heldout_name else _some_text(rng)
    yield "topics/copied", _COPIED


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the documents by a few hundred kilobytes."""
    monkeypatch.setattr(stdlib_corpus, "documents", _some_documents)


def _read(prefix: Path) -> list[np.ndarray]:
    dataset = IndexedDataset(str(prefix))
    # Copies: the dataset unmaps its file when it goes, and reading a view of it after that is a segmentation fault.
    return [tokens.copy() for tokens in dataset[:]]


def _build_quietly(directory: Path) -> stdlib_corpus.Corpus:
    return stdlib_corpus.build(directory, report=lambda line: None)


def test_documents_have_kinds_sizes_and_unique_names() -> None:
    named_texts = list(stdlib_corpus.documents())
    names = [name for name, _ in named_texts]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} >= {"stdlib", "unicode"}
    assert min(len(text) for _, text in named_texts) >= stdlib_corpus.MIN_DOCUMENT_BYTES
    assert 5e6 < sum(len(text) for _, text in named_texts) < 30e6
    assert not any("/test/" in name or "site-packages" in name or "encodings" in name for name in names)
    b"".join(text for _, text in named_texts).decode()


def test_heldout_shares_no_text_with_training() -> None:
    train, heldout = stdlib_corpus._split(stdlib_corpus.documents())
    assert not {name for name, _ in train} & {name for name, _ in heldout}
    assert not {text for _, text in train} & {text for _, text in heldout}
    assert all(stdlib_corpus.is_heldout(name) for name, _ in heldout)
    assert not any(name.startswith("topics/") for name, _ in heldout)
    num_train_bytes, num_heldout_bytes = (sum(len(text) for _, text in part) for part in (train, heldout))
    assert 0.005 < num_heldout_bytes / num_train_bytes < 0.05


def test_documents_and_split_are_the_same_when_hash_seed_differs() -> None:
    program = (
        "import hashlib; from mempar.tools import stdlib_corpus as c; digest = hashlib.sha256()\n"
        "for name, text in c.documents(): digest.update(repr((name, text, c.is_heldout(name))).encode())\n"
        "print(digest.hexdigest())"
    )
    source = str(Path(stdlib_corpus.__file__).parents[2])
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": source}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("character", "line"),
    [
        ("A", "U+0041 is LATIN CAPITAL LETTER A, category Lu.\n"),
        ("½", "U+00BD is VULGAR FRACTION ONE HALF, category No, value 1/2, made of <fraction> 0031 2044 0032.\n"),
        ("\N{MALAYALAM FRACTION ONE ONE-HUNDRED-AND-SIXTIETH}", None),
        ("é", "U+00E9 is LATIN SMALL LETTER E WITH ACUTE, category Ll, made of 0065 0301.\n"),
        ("一", ""),
        ("\N{CJK COMPATIBILITY IDEOGRAPH-F900}", ""),
        ("가", ""),
        ("\n", ""),
    ],
)
def test_character_line_says_what_the_database_says(character: str, line: str | None) -> None:
    if line is None:
        code_point = ord(character)
        line = f"U+{code_point:04X} is {unicodedata.name(character)}, category No, value 1/160.\n"
    assert stdlib_corpus._describe_character(ord(character)) == line


@pytest.mark.usefixtures("small_corpus")
def test_build_returns_every_byte_through_megatron(tmp_path: Path) -> None:
    corpus = _build_quietly(tmp_path / "deep" / "corpus")
    train, heldout = stdlib_corpus._split(_some_documents())
    assert _COPIED in {text for _, text in train}
    assert _COPIED not in {text for _, text in heldout}
    for prefix, num_tokens, named_texts in (
        (corpus.train_prefix, corpus.train_tokens, train),
        (corpus.heldout_prefix, corpus.heldout_tokens, heldout),
    ):
        sequences = _read(prefix)
        assert len(sequences) == len(named_texts) > 0
        for tokens, (_, text) in zip(sequences, named_texts, strict=True):
            assert tokens.dtype == np.uint16
            assert tokens[-1] == corpus.eod_token == corpus.vocab_size - 1
            assert tokens[:-1].astype(np.uint8).tobytes() == text
            assert tokens[:-1].max() < 256
        manifest = read_manifest(prefix)
        assert manifest is not None
        assert sum(map(len, sequences)) == num_tokens == manifest.tokens
        assert (manifest.documents, manifest.tokenizer) == (len(sequences), "byte")


@pytest.mark.usefixtures("small_corpus")
def test_second_build_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "corpus"
    first = _build_quietly(directory)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()}
    monkeypatch.setattr(stdlib_corpus, "documents", lambda: pytest.fail("the corpus was built again"))
    assert _build_quietly(directory) == first
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.usefixtures("small_corpus")
def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _build_quietly(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == digest


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize("damage", ["version", "manifest", "truncated", "missing"])
def test_build_replaces_corpus_when_out_of_date_or_damaged(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "corpus"
    _build_quietly(directory)
    whole = (directory / "train.bin").read_bytes()
    manifest = directory / "manifest.json"
    if damage == "version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "python_version": "3.0.0"}))
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "truncated":
        (directory / "train.bin").write_bytes(whole[:-2])
    else:
        (directory / "train.bin").unlink()
    _build_quietly(directory)
    assert (directory / "train.bin").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.usefixtures("small_corpus")
def test_build_leaves_a_foreign_directory_alone(tmp_path: Path) -> None:
    # Somebody's own data may well be called train.bin; without a manifest it is not ours to replace.
    (tmp_path / "train.bin").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"train\.bin"):
        _build_quietly(tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"mine"
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="a file"):
        _build_quietly(tmp_path / "file")


@pytest.mark.usefixtures("small_corpus")
def test_build_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_corpus, "documents", lambda: iter([("topics/alone", b"x" * 100)]))
    with pytest.raises(ConfigError, match="no heldout documents"):
        _build_quietly(tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize("already_there", ["nothing", "out_of_date"])
def test_concurrent_builders_agree(tmp_path: Path, already_there: str) -> None:
    directory = tmp_path / "corpus"
    if already_there == "out_of_date":
        _build_quietly(directory)
        (directory / "manifest.json").write_text("{}")
    # Threads, as they meet at the same file system calls and need no second import of torch.
    barrier = threading.Barrier(4)

    def work(_: int) -> stdlib_corpus.Corpus:
        barrier.wait()
        return _build_quietly(directory)

    with ThreadPoolExecutor(4) as pool:
        corpora = set(pool.map(work, range(4)))
    assert corpora == {_build_quietly(directory)}
    assert sum(map(len, _read(directory / "train"))) == corpora.pop().train_tokens
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.usefixtures("small_corpus")
def test_build_keeps_the_corpus_of_a_faster_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "corpus"
    faster = []

    def documents_while_another_finishes() -> Iterator[tuple[str, bytes]]:
        monkeypatch.setattr(stdlib_corpus, "documents", _some_documents)
        faster.append((_build_quietly(directory), (directory / "train.bin").stat().st_ino))
        yield from _some_documents()

    monkeypatch.setattr(stdlib_corpus, "documents", documents_while_another_finishes)
    corpus = _build_quietly(directory)
    assert faster == [(corpus, (directory / "train.bin").stat().st_ino)]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
