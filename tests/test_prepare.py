"""`mempar prepare`: every format to Megatron's files, the same for any number of workers; bad input is refused."""

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.manifest import DataManifest, checksum, read_index, read_manifest
from mempar.runtime.data.tokenizer import parse_spec
from mempar.runtime.mcore import IndexedDataset
from mempar.tools.prepare import parquet, reading
from mempar.tools.prepare.command import prepare
from mempar.tools.prepare.encoding import Job, encode_all
from mempar.tools.prepare.index import token_dtype
from mempar.tools.prepare.inputs import find_inputs
from mempar.tools.prepare.segments import Position
from toy_tokenizers import AWKWARD, all_specs

COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut batches and pieces often, so that little text has many of them."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 600)
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    monkeypatch.setattr(reading, "_WINDOW_BYTES", 60)
    monkeypatch.setattr(parquet, "ROWS_AT_A_TIME", 3)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return all_specs(tmp_path_factory.mktemp("tokenizers"))


def run(inputs: list[Path], out: Path, tokenizer: str = "byte", workers: int = 1, **options: Any) -> DataManifest:
    return prepare(
        [str(path) for path in inputs], tokenizer=tokenizer, out=out, workers=workers, say=lambda _: None, **options
    )


def texts_of(prefix: Path, tokenizer: str = "byte") -> list[str]:
    """Decode the documents as Megatron reads them; each must end, and only end, with the end of document."""
    encoder, data = load_encoder(parse_spec(tokenizer)), IndexedDataset(str(prefix))
    documents = [tokens.tolist() for tokens in data[:]]
    assert data.document_indices.tolist() == list(range(len(documents) + 1))
    assert all(tokens.index(encoder.eod) == len(tokens) - 1 for tokens in documents)
    return [encoder.decode(tokens) for tokens in documents]


def some_texts(rng: random.Random) -> list[str]:
    words = ["memory", "row", "slot", "Grüße", "日本", "👩‍👧", "42", "\t", "the"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(40)] + AWKWARD


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text, **more}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list[str | None], kind: Any = None) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    return path


def test_every_tokenizer_gives_the_text_back_through_megatron(
    specs: list[str], tmp_path: Path, rng: random.Random
) -> None:
    texts = some_texts(rng)
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    for number, spec in enumerate(specs):
        prefix = tmp_path / str(number)
        manifest = run([source], prefix, spec)
        assert texts_of(prefix, spec) == texts
        tokens = np.fromfile(f"{prefix}.bin", dtype=manifest.dtype)
        assert (manifest.documents, manifest.tokens) == (len(texts), tokens.size)
        assert manifest.largest_token == tokens.max() < manifest.vocab_size
        header = read_index(prefix)
        assert (header.dtype, header.documents, header.tokens) == (manifest.dtype, len(texts), tokens.size)
        assert (manifest.bin, manifest.idx) == tuple(checksum(Path(f"{prefix}.{one}")) for one in ("bin", "idx"))
        assert read_manifest(prefix) == manifest
        assert sorted(path.name for path in tmp_path.glob(f"{number}*")) == [
            f"{number}.{suffix}" for suffix in ("bin", "idx", "json")
        ]


def formats(texts: list[str], folder: Path) -> dict[str, Path]:
    """The same documents in every format and compression."""
    found = {"parquet": write_parquet(folder / "x.parquet", texts), "jsonl": write_jsonl(folder / "x.jsonl", texts)}
    found["large strings"] = write_parquet(folder / "y.parquet", texts, pyarrow.large_string())
    for name, compress in COMPRESS.items():
        found[name] = folder / f"x.jsonl.{name}"
        found[name].write_bytes(compress(found["jsonl"].read_bytes()))
    return found


def test_every_format_and_compression_gives_the_same_files(tmp_path: Path, rng: random.Random) -> None:
    texts = some_texts(rng)
    bytes_of = {}
    for name, source in formats(texts, tmp_path).items():
        prefix = tmp_path / f"from {name}"
        run([source], prefix)
        bytes_of[name] = [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx")]
    assert len(bytes_of) == 7
    assert all(one == bytes_of["jsonl"] for one in bytes_of.values()), "formats differ"
    assert texts_of(tmp_path / "from parquet") == texts


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_is_cut_into_files_lines_or_paragraphs(tmp_path: Path, rng: random.Random, newline: str) -> None:
    paragraphs = [newline.join(text.split()) for text in some_texts(rng)[:40] if text.split()]
    text = newline * 2 + "".join(one + newline * rng.randrange(2, 5) for one in paragraphs) + "last"
    source = tmp_path / "x.txt"
    source.write_bytes(text.encode())
    for name, compress in COMPRESS.items():
        (tmp_path / f"x.{name}").write_bytes(compress(text.encode()))
    wanted = {
        "file": [text],
        "line": [line for line in text.replace("\r", "").split("\n") if line],
        "paragraph": [*paragraphs, "last"],
    }
    for unit, documents in wanted.items():
        run([source], tmp_path / unit, unit=unit)
        assert texts_of(tmp_path / unit) == documents
        for name in COMPRESS:
            run([tmp_path / f"x.{name}"], tmp_path / f"{unit}-{name}", unit=unit)
            assert (tmp_path / f"{unit}-{name}.bin").read_bytes() == (tmp_path / f"{unit}.bin").read_bytes()


@pytest.mark.parametrize("filler", ["a line\n", "日本", "x\r", "long " * 30 + "\n", "\n"])
def test_long_files_are_one_document_however_they_are_cut(tmp_path: Path, specs: list[str], filler: str) -> None:
    # Around the end of the first piece, where the window closes, and after many pieces.
    for size in (0, 1, 498, 499, 500, 501, 558, 559, 560, 561, 1060, 3000):
        text = (filler * (size // len(filler.encode()) + 1)).encode()[:size].decode(errors="ignore")
        source = tmp_path / f"{size}.txt"
        source.write_bytes(text.encode())
        (tmp_path / "other.txt").write_text("other")
        for spec in specs[:2]:
            prefix = tmp_path / f"{size}-{spec[:4]}"
            manifest = run([source, tmp_path / "other.txt"], prefix, spec)
            assert texts_of(prefix, spec) == ([text, "other"] if text else ["other"])
            assert manifest.skipped == {"empty": int(not text), "bad": 0}


def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path, specs: list[str], rng: random.Random) -> None:
    text = "".join(rng.choice(["the table\n", "memory  \n", "    the rows\n", "\n", "= 1\n"]) for _ in range(800))
    (tmp_path / "x.txt").write_text(text)
    for spec in (specs[1], specs[3]):
        prefix = tmp_path / spec[:2]
        run([tmp_path / "x.txt"], prefix, spec)
        (whole,) = load_encoder(parse_spec(spec)).encode([text])
        # Named, because a data set that is gone unmaps what was read from it.
        data = IndexedDataset(str(prefix))
        assert data[0].tolist()[:-1] == list(whole)


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, specs: list[str], rng: random.Random) -> None:
    sources = list(formats(some_texts(rng), tmp_path).values())
    (tmp_path / "long.txt").write_text("a long document\n" * 500)
    for workers in (1, 2, 3):
        run([*sources, tmp_path / "long.txt"], tmp_path / str(workers), specs[1], workers)
    for suffix in ("bin", "idx", "json"):
        assert len({(tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (1, 2, 3)}) == 1


def test_no_more_than_a_few_batches_are_read_ahead(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["text " * 30] * 200)
    batches = list(
        reading.read_batches(find_inputs([str(source)], tmp_path / "out"), Position(), unit="file", field="text")
    )
    assert len(batches) > 40
    job = Job(spec=parse_spec("byte"), unit="file", field="text", dtype="uint16", skip_bad=False)
    for workers, most in ((1, 1), (2, 6)):
        taken: list[Any] = []
        ahead = (taken.append(batch) or batch for batch in batches)
        for done, (batch, _) in enumerate(encode_all(ahead, job, load_encoder(job.spec), workers)):
            assert batch is batches[done] and len(taken) - done <= most


def test_directories_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.jsonl", ".hidden", "a/.git/x", "c.json"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n' if "json" in name else name)
    run([tmp_path / "in"], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["a/b.jsonl", "a/z.txt", "b.txt", "c.json"]
    with pytest.raises(ConfigError, match="lies in the INPUT directory"):
        run([tmp_path / "in"], tmp_path / "in" / "out")


def test_field_and_format_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "x.data").write_text('\ufeff{"body": "one", "text": 3}\n\n  \n{"body": "two"}')
    run([tmp_path / "x.data"], tmp_path / "out", form="jsonl", field="body")
    assert texts_of(tmp_path / "out") == ["one", "two"]


@pytest.mark.parametrize("size", [257, 65499, 65500, 65536, 65537, 200000])
def test_dtype_is_megatrons_choice(size: int) -> None:
    assert token_dtype(size) == DType.optimal_dtype(size)


BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "utf-8": ("x.txt", lambda: b"one\n\ntwo \xff three", r"x\.txt, line 3: invalid UTF-8 \(byte 0xff"),
    "utf-8 in a later piece": ("x.txt", lambda: b"line\n" * 300 + b"\xff", r"x\.txt, line 301: invalid UTF-8"),
    "utf-8 in json": ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "\xff"}', r"x\.jsonl, line 2: invalid UTF-8"),
    "no json": ("x.jsonl", lambda: b'{"text": "a"}\n' * 99 + b"{", r"x\.jsonl, line 100: no JSON"),
    "no field": ("x.jsonl", lambda: b'{"text": "a"}\n{"body": 1}\n', r"line 2: no field text: it has body"),
    "no object": ("x.jsonl", lambda: b'["text"]\n', r"line 1: no field text: it is no object"),
    "number": ("x.jsonl", lambda: b'{"text": 1}\n', r"line 1: field text holds int"),
    "surrogate": ("x.jsonl", lambda: b'{"text": "\\ud83d"}\n', r"line 1: half of a surrogate pair"),
    "short gzip": ("x.txt.gz", lambda: gzip.compress(b"text" * 999)[:-9], r"x\.txt\.gz cannot be read on.*damaged"),
    "damaged gzip": ("x.txt.gz", lambda: b"\x1f\x8bnot", r"x\.txt\.gz cannot be read on"),
    "no gzip": ("x.txt.gz", lambda: b"plain text", r"x\.txt\.gz cannot be read on"),
    "short bz2": ("x.bz2", lambda: bz2.compress(b"text" * 999)[:-9], r"x\.bz2 cannot be read on"),
    "short xz": ("x.xz", lambda: lzma.compress(b"text" * 999)[:-9], r"x\.xz cannot be read on"),
    "short zst": ("x.zst", lambda: COMPRESS["zst"](b"text" * 999)[:-3], r"x\.zst cannot be read on"),
    "no zst": ("x.zst", lambda: b"plain text", r"x\.zst cannot be read on"),
    "no parquet": ("x.parquet", lambda: b"plain text", r"x\.parquet cannot be read as Parquet"),
    "empty": ("x.txt", lambda: b"", r"no tokens in 1 files \(1 empty"),
    "parquet in gzip": ("x.parquet.gz", lambda: b"", r"decompress the file first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ConfigError, match=message):
        run([tmp_path / name], tmp_path / "out")
    assert not list(tmp_path.glob("out.*n")), "something was taken for finished"


def test_bad_documents_are_skipped_when_asked(tmp_path: Path) -> None:
    rows = ['{"text": "good"}', "{", '{"text": ""}', '{"body": 1}', '{"text": "too"}']
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    write_parquet(tmp_path / "y.parquet", ["one", None, "two"])
    (tmp_path / "z.txt").write_bytes(b"\xff")
    said: list[str] = []
    files = [str(tmp_path / name) for name in ("x.jsonl", "y.parquet", "z.txt")]
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: no JSON"):
        prepare(files, tokenizer="byte", out=out, workers=2, say=said.append)
    manifest = prepare(files, tokenizer="byte", out=out, workers=2, skip_bad=True, say=said.append)
    assert texts_of(out) == ["good", "too", "one", "two"]
    assert manifest.skipped == {"empty": 1, "bad": 4}
    assert [line.partition(f"{tmp_path}/")[2].partition(":")[0] for line in said if "left out:" in line] == [
        "x.jsonl, line 2",
        "x.jsonl, line 4",
        "y.parquet, line 2",
        "z.txt, line 1",
    ]
    (tmp_path / "long.txt").write_bytes(b"line\n" * 300 + b"\xff")
    with pytest.raises(ConfigError, match=r"line 301.*beginning has been written"):
        run([tmp_path / "long.txt"], tmp_path / "long", skip_bad=True)


def test_missing_columns_and_columns_without_text_are_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "x.parquet", ["one"])
    with pytest.raises(ConfigError, match=r"no column body; its columns are: id, text"):
        run([source], tmp_path / "out", field="body")
    with pytest.raises(ConfigError, match=r"int64 in column id"):
        run([source], tmp_path / "out", field="id")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"unit": "word"}, "--documents word is not known.*file, line, paragraph"),
        ({"form": "csv"}, "--format csv is not known.*text, jsonl, parquet"),
        ({"tokenizer": "gpt2"}, "--tokenizer=gpt2 is not known"),
        ({"inputs": ["nowhere"]}, "nowhere does not exist"),
    ],
)
def test_unknown_choices_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "x.txt").write_text("text")
    options = {"inputs": [str(tmp_path / "x.txt")], "tokenizer": "byte", **options}
    with pytest.raises(ConfigError, match=message):
        prepare(out=tmp_path / "out" / "x", say=print, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("library", "name"), [("pyarrow", "x.parquet"), ("zstandard", "x.zst")])
def test_missing_library_of_a_format_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"{library}.*mempar\[data\]"):
        run([tmp_path / name], tmp_path / "out")
