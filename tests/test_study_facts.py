"""mempar.tools.study facts, wordings, tokenizer, packing and corpus: what is told, and what is only asked."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from full_disk import full_disk
from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import check_files
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.manifest import read_manifest
from mempar.runtime.data.tokenizer import TokenizerSpec, parse_spec
from mempar.tools.study import corpus
from mempar.tools.study.directory import StudyDir
from mempar.tools.study.facts import BLOCK, CATEGORY, CODE_POINT, DECOMPOSITION, KINDS, NAME, VALUE, draw_facts, sources
from mempar.tools.study.packing import pack
from mempar.tools.study.tokenizer import END, train_tokenizer
from mempar.tools.study.wordings import WORDINGS, held_out, sentence, told
from study_runs import MICRO

FACTS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a micro study."""
    path = tmp_path_factory.mktemp("study") / "corpus"
    corpus.build(path, MICRO)
    return path


def encoder_of(folder: Path) -> Encoder:
    return load_encoder(TokenizerSpec("hf", str(folder / corpus.TOKENIZER)))


def test_facts_are_true_and_of_every_kind() -> None:
    facts = draw_facts(30_000, seed=1)
    by_kind = Counter(fact.kind for fact in facts)
    assert set(by_kind) == set(KINDS) and len(facts) == 30_000
    assert len({(fact.kind, fact.subject) for fact in facts}) == len(facts)
    known = {(fact.kind, fact.subject): fact.answer for fact in facts}
    expected = {
        (NAME, "U+0041"): "LATIN CAPITAL LETTER A",
        (CODE_POINT, "PILE OF POO"): "U+1F4A9",
        (CATEGORY, "U+0041"): "uppercase letter",
        (BLOCK, "U+1F4A9"): "Miscellaneous Symbols and Pictographs",
        (VALUE, "U+2153"): "1/3",
        (DECOMPOSITION, "U+00C4"): "U+0041 U+0308",
        (DECOMPOSITION, "U+2122"): "super U+0054 U+004D",
    }
    found = {key: known[key] for key in expected if key in known}
    assert found == {key: expected[key] for key in found} and len(found) > 2
    named = [fact for fact in facts if fact.kind == NAME]
    assert not [one for one in named if one.answer.endswith(f"-{one.subject.removeprefix('U+')}")]
    assert not [one for one in named if one.answer.startswith("HANGUL SYLLABLE ")]
    assert all(fact.answer.isascii() for fact in facts)


def test_facts_are_the_same_for_the_same_seed_and_begin_alike() -> None:
    assert draw_facts(FACTS, 1) == draw_facts(2 * FACTS, 1)[:FACTS] != draw_facts(FACTS, 2)
    assert set(sources()) == {"unicode", "fonttools"}


def test_more_facts_than_there_are_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"1,000,000 facts are more than the [\d,]+ that Unicode"):
        draw_facts(1_000_000, 1)


def test_settings_that_no_corpus_can_have_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq_length=16 is too short for a sentence of \d+ tokens"):
        corpus.build(tmp_path / "short", dataclasses.replace(MICRO, seq_length=16))
    with pytest.raises(ConfigError, match="vocab_size=95 has no room"):
        corpus.build(tmp_path / "few", dataclasses.replace(MICRO, vocab_size=95))


def test_blocks_without_fonttools_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mempar.tools.study import facts

    facts._block_names.cache_clear()
    monkeypatch.setitem(sys.modules, "fontTools.unicodedata", None)
    with pytest.raises(ConfigError, match=r"pip install 'mempar\[study\]'"):
        draw_facts(FACTS, 1)
    facts._block_names.cache_clear()


def test_every_wording_is_told_of_some_and_held_out_of_others() -> None:
    facts = draw_facts(FACTS, 1)
    for kind, wordings in WORDINGS.items():
        assert len(set(wordings)) == len(wordings) > 2
        mine = [fact for fact in facts if fact.kind == kind]
        assert {held_out(fact, 1) for fact in mine} == set(range(len(wordings))), kind
        for fact in mine:
            assert sorted([*told(fact, 1), held_out(fact, 1)]) == list(range(len(wordings)))
    assert [held_out(fact, 1) for fact in facts] != [held_out(fact, 2) for fact in facts]


def test_no_wording_of_a_fact_contains_another() -> None:
    """Or a held-out wording would be told as part of another one."""
    for fact in draw_facts(FACTS, 1):
        asked = sentence(fact, held_out(fact, 1)).question
        assert not [wording for wording in told(fact, 1) if asked in sentence(fact, wording).question]


def test_held_out_wording_never_occurs_with_its_fact_in_the_corpus(folder: Path) -> None:
    encoder, manifest = encoder_of(folder), read_manifest(folder / corpus.TRAIN)
    assert manifest is not None and manifest.documents == MICRO.steps * MICRO.batch_size + 1
    documents = np.fromfile(folder / "train.bin", dtype=manifest.dtype).reshape(-1, MICRO.seq_length)
    assert (documents[:, -1] == encoder.eod).all()
    text = "".join(encoder.decode(document) for document in documents)
    asked = corpus.load_asked(folder)
    assert [one.fact for one in asked] == draw_facts(MICRO.facts, MICRO.fact_seed)
    times = Counter()
    for one in asked:
        held = sentence(one.fact, one.wording)
        assert held.question not in text
        for wording in told(one.fact, MICRO.fact_seed):
            said = sentence(one.fact, wording)
            times[one.fact] += text.count(said.question + said.answer)
    # Every pass tells every fact once.
    assert min(times.values()) >= 1 and max(times.values()) - min(times.values()) <= 1
    # And nothing else is told.
    sentences = sum(text.count(f"{sentence(one.fact, w).question}") for one in asked for w in told(one.fact, 1))
    assert sentences == times.total() == sum(document.count(".") for document in [text])


def test_corpus_is_the_same_again_and_fits_a_run(folder: Path, tmp_path: Path) -> None:
    corpus.build(tmp_path / "again", MICRO)
    for name in ("facts.jsonl", "tokenizer/tokenizer.json", "train.bin", "train.idx"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("train.*")}
    corpus.build(folder, MICRO)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("train.*")}
    check_files(RunConfig(data=corpus.data_of(folder)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.bin", r"train\.bin has \d+ bytes, and .*train\.json says \d+"),
        ("train.json", r"train\.json cannot be read as a manifest"),
        ("tokenizer/tokenizer.json", r"the tokenizer .* cannot be loaded"),
    ],
)
def test_corpus_that_was_cut_short_says_what_to_delete(folder: Path, tmp_path: Path, name: str, said: str) -> None:
    cut = tmp_path / "corpus"
    shutil.copytree(folder, cut)
    (cut / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"the corpus of the study is damaged: .*{said}.*; delete {cut}, and the"):
        corpus.build(cut, MICRO)


def test_other_facts_are_not_written_over(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus"
    shutil.copytree(folder, other)
    before = (other / "facts.jsonl").stat().st_mtime_ns
    corpus.build(other, MICRO)
    assert (other / "facts.jsonl").stat().st_mtime_ns == before
    facts = (folder / "facts.jsonl").read_text().replace("LETTER", "NUMBER")
    (other / "facts.jsonl").write_text(facts)
    with pytest.raises(ConfigError, match=r"facts\.jsonl holds other facts than these settings make; .* delete"):
        corpus.build(other, MICRO)
    assert (other / "facts.jsonl").read_text() == facts


def test_study_goes_on_with_its_own_corpus_alone(folder: Path, tmp_path: Path) -> None:
    paths = StudyDir(tmp_path)
    paths.open("quick", MICRO)
    checksums = corpus.checksums(folder)
    assert set(checksums) == {"facts.jsonl", "tokenizer/tokenizer.json", "train.bin"}
    # What no run has read may be another one.
    paths.remember(checksums | {"train.bin": "xxh3_128:0"})
    paths.remember(checksums)
    (paths.runs / "dense-seed1").mkdir()
    paths.remember(checksums)
    with pytest.raises(ConfigError, match=r"not the corpus that the runs .*: facts\.jsonl differs; .* another --out"):
        paths.remember(checksums | {"facts.jsonl": "sha256:0"})
    # A study of before knows of none.
    paths.checksums.unlink()
    paths.remember(checksums)
    assert json.loads(paths.checksums.read_text()) == checksums


def test_tokenizer_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="too large"):
        train_tokenizer([" a is b."], 256, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_digits_of_code_points_are_tokens_and_parts_make_up_the_sentence(folder: Path) -> None:
    encoder = encoder_of(folder)
    for fact in draw_facts(60, 3):
        for wording in range(len(WORDINGS[fact.kind])):
            both = sentence(fact, wording)
            ((question, answer),) = corpus.encode(encoder, [corpus.Asked(fact=fact, wording=wording)])
            (whole,) = encoder.encode([both.question + both.answer])
            assert question + answer == list(whole)
            assert encoder.decode(question + answer) == both.question + both.answer
    (tokens,) = encoder.encode([" U+1F4A9 is U+0041."])
    pieces = [encoder.decode([token]) for token in tokens]
    assert [piece for piece in pieces if piece in "0123456789ABCDEF"] == [*"1F4A9", *"0041"]


def test_tokenizer_is_the_same_again_and_knows_its_end(tmp_path: Path) -> None:
    texts = [f" {fact.subject} is {fact.answer}." for fact in draw_facts(FACTS, 1)]
    specs = [train_tokenizer(texts, 300, tmp_path / name) for name in ("a", "b")]
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b"))
    assert one == other
    encoder = load_encoder(parse_spec(str(specs[0])))
    assert encoder.vocab_size == 300 and encoder.decode([encoder.eod]) == ""
    assert encoder.eod not in encoder.encode([END])[0]


def test_documents_hold_every_sentence_once_and_whole(fresh_seed: int) -> None:
    chooser = np.random.default_rng(fresh_seed)
    lengths = chooser.integers(1, 32, 300)
    sentences = [np.full(length, number + 1) for number, length in enumerate(lengths)]
    documents = pack(sentences, chooser.permutation(300), 32, 0)
    assert documents.shape[1] == 32 and (documents[:, -1] == 0).all()
    for number, length in enumerate(lengths):
        rows, columns = np.nonzero(documents == number + 1)
        assert len(set(rows)) == 1 and (np.diff(columns) == 1).all() and len(columns) == length
    # Without looking ahead a quarter would be empty.
    assert (documents == 0).mean() < 0.15


def test_sentence_that_fits_nowhere_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="fits in no document of 8"):
        pack([np.ones(8, dtype=np.int64)], np.array([0]), 8, 0)
