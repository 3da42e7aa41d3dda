"""Real text that every Python installation already has, as a Megatron byte-token data set.

A language model that is to show what extra memory buys needs text with facts in it, and a first run should need no
download. This module gathers the reference topics of `pydoc`, the sources of the standard library and the character
names of the Unicode database (10 to 20 MB together), and writes them with one token per byte in Megatron's indexed
format. It comes before the data loader of `mempar train smoke`; it neither shuffles nor cuts into sequences.

The text depends on the Python version, so losses are comparable between runs of the same version only.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import load_encoder
from mempar.runtime.data.tokenizer import parse_spec
from mempar.tools.prepare.documents import Document
from mempar.tools.prepare.encoding import encode_documents
from mempar.tools.prepare.manifest import command_of, describe
from mempar.tools.prepare.partial import Partial
from mempar.tools.prepare.segments import Position

# Raise it whenever documents(), is_heldout() or the layout of the files changes: older corpora are then built again.
CORPUS_FORMAT_VERSION = 2
VOCAB_SIZE = 257
EOD_TOKEN = 256
MIN_DOCUMENT_BYTES = 64

_FILE_NAMES = ("train.bin", "train.idx", "train.json", "heldout.bin", "heldout.idx", "heldout.json")
_MANIFEST_NAME = "manifest.json"
_HELDOUT_ONE_IN = 50
_CODE_POINTS_PER_BLOCK = 256
_NUM_CODE_POINTS = 0x110000
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Character tables with hardly any prose, and what names the machine that Python was built on.
_SKIPPED_TOP_PREFIXES = ("encodings", "_sysconfigdata", "config-", "pydoc_data")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where the two token files lie and how many tokens each holds; prefixes are paths without `.bin` or `.idx`."""

    train_prefix: Path
    heldout_prefix: Path
    train_tokens: int
    heldout_tokens: int
    vocab_size: int = VOCAB_SIZE
    eod_token: int = EOD_TOKEN


def documents() -> Iterator[tuple[str, bytes]]:
    """Yield every document as (name, text), in an order that is the same for the same Python installation.

    Names start with their kind: `topics/`, `stdlib/` or `unicode/`. Texts are valid UTF-8 of at least
    `MIN_DOCUMENT_BYTES` bytes.
    """
    for source in (_topic_documents(), _source_documents(), _unicode_documents()):
        for name, text in source:
            if len(text) >= MIN_DOCUMENT_BYTES:
                yield name, text


def is_heldout(name: str) -> bool:
    """Return whether the document of this name is kept from training: about 2% of names, by a stable hash.

    Topics are never held out: a third of them repeat, line for line, what other topics say.
    """
    if name.startswith("topics/"):
        return False
    digest = hashlib.sha256(f"heldout:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELDOUT_ONE_IN == 0


def build(directory: Path, report: Callable[[str], None] = print) -> Corpus:
    """Write the corpus into `directory`, or do nothing when it is already there.

    Processes may call it at the same time: each writes beside `directory`, and the first to rename its result wins.
    A corpus of another Python or format version is replaced, so no process should be reading it.

    Args:
        directory: receives train and heldout as .bin and .idx (uint16 tokens, one document a sequence, each closed by
            `EOD_TOKEN`) with .json beside them, as `mempar prepare` writes them, and manifest.json of all. Parents are
            made.
        report: called with one line of text for each thing worth telling.

    Returns:
        The corpus that lies in `directory`.

    Raises:
        ConfigError: `directory` holds something other than a corpus of this module.
        ConfigError: this Python installation has too little text for a training and a held-out file.
    """
    directory = Path(directory).resolve()
    corpus = _load_current(directory)
    if corpus is not None:
        report(f"corpus in {directory} is up to date: {corpus.train_tokens} training tokens")
        return corpus
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its mode 0700 would outlive the rename and shut out other users of a shared folder.
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        num_tokens = _write(temporary, report)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report(f"corpus in {directory}: {num_tokens['train']} training and {num_tokens['heldout']} held-out tokens")
    return _corpus_of(directory, num_tokens)


def _topic_documents() -> Iterator[tuple[str, bytes]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        # Some Linux distributions package it apart; sources and Unicode are enough to go on with.
        return
    for topic in sorted(topics):
        yield f"topics/{topic}", topics[topic].encode()


def _source_documents() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for path in sorted(paths):
        if path.startswith(_SKIPPED_TOP_PREFIXES):
            continue
        text = (root / path).read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        yield f"stdlib/{path}", text


def _unicode_documents() -> Iterator[tuple[str, bytes]]:
    for start in range(0, _NUM_CODE_POINTS, _CODE_POINTS_PER_BLOCK):
        lines = map(_describe_character, range(start, start + _CODE_POINTS_PER_BLOCK))
        yield f"unicode/U+{start:04X}", "".join(line for line in lines if line).encode()


def _describe_character(code_point: int) -> str:
    """Return one line of facts, or nothing where the code point has no name or one that a rule makes."""
    character = chr(code_point)
    name = unicodedata.name(character, "")
    # Ideographs are named after their number and Hangul syllables after their parts: nothing to remember there.
    if not name or name.endswith(f"-{code_point:04X}") or name.startswith("HANGUL SYLLABLE "):
        return ""
    facts = [f"U+{code_point:04X} is {name}", f"category {unicodedata.category(character)}"]
    value = unicodedata.numeric(character, None)
    if value is not None:
        # The database has fractions such as 1/320, which it hands out as floats.
        facts.append(f"value {Fraction(value).limit_denominator(1000)}")
    decomposition = unicodedata.decomposition(character)
    if decomposition:
        facts.append(f"made of {decomposition}")
    return ", ".join(facts) + ".\n"


def _split(named_texts: Iterable[tuple[str, bytes]]) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Return training and held-out documents; a held-out one whose very text is in training is dropped."""
    train, heldout = [], []
    for name, text in named_texts:
        (heldout if is_heldout(name) else train).append((name, text))
    train_texts = {text for _, text in train}
    return train, [(name, text) for name, text in heldout if text not in train_texts]


def _write(directory: Path, report: Callable[[str], None]) -> dict[str, int]:
    """Write all files and return the number of tokens of each split."""
    splits = dict(zip(("train", "heldout"), _split(documents()), strict=True))
    manifest: dict = {**_identity(), "tokens": {}, "num_bytes_by_kind": {}}
    for split, named_texts in splits.items():
        if not named_texts:
            raise ConfigError(
                f"no {split} documents among the texts of this Python installation ({sysconfig.get_path('stdlib')}); "
                "the corpus needs the sources of the standard library; install them or train on other data."
            )
        by_kind: Counter[str] = Counter()
        for name, text in named_texts:
            by_kind[name.split("/")[0]] += len(text)
        report(f"{split}: {len(named_texts)} documents, bytes by kind {dict(by_kind)}")
        manifest["num_bytes_by_kind"][split] = dict(by_kind)
        manifest["tokens"][split] = _write_tokens(directory / split, [text for _, text in named_texts])
    manifest["file_bytes"] = {name: (directory / name).stat().st_size for name in _FILE_NAMES}
    manifest["sha256"] = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in _FILE_NAMES}
    (directory / _MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    return manifest["tokens"]


def _write_tokens(prefix: Path, texts: list[bytes]) -> int:
    """Write `prefix`.bin, .idx and .json and return the number of tokens, end-of-document tokens included."""
    spec = parse_spec("byte")
    encoder = load_encoder(spec)
    wanted = describe(str(spec), encoder, [], {"corpus": "stdlib"})
    partial = Partial(prefix, command_of(wanted), np.dtype(wanted.dtype))
    try:
        documents = [Document(line=1, text=text.decode()) for text in texts]
        partial.add(encode_documents(documents, encoder, partial.dtype), Position(), 0)
        return partial.finish(wanted).tokens
    finally:
        partial.close()


def _identity() -> dict[str, int | str]:
    return {"format_version": CORPUS_FORMAT_VERSION, "python_version": platform.python_version()}


def _corpus_of(directory: Path, num_tokens: dict[str, int]) -> Corpus:
    return Corpus(
        train_prefix=directory / "train",
        heldout_prefix=directory / "heldout",
        train_tokens=num_tokens["train"],
        heldout_tokens=num_tokens["heldout"],
    )


def _load_current(directory: Path) -> Corpus | None:
    """Return the corpus in `directory` if its manifest and file sizes are those of this Python, else None."""
    try:
        manifest = json.loads((directory / _MANIFEST_NAME).read_text())
        if any(manifest[key] != value for key, value in _identity().items()):
            return None
        if any((directory / name).stat().st_size != manifest["file_bytes"][name] for name in _FILE_NAMES):
            return None
        return _corpus_of(directory, manifest["tokens"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _refuse_foreign(directory: Path) -> None:
    """Raise unless `directory` may be replaced: because it is missing, empty, or an out-of-date corpus."""
    try:
        names = {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = {"(a file)"}
    if not names or (_MANIFEST_NAME in names and names <= {*_FILE_NAMES, _MANIFEST_NAME}):
        return
    raise ConfigError(
        f"{directory} holds {sorted(names)[:4]}, which is no corpus of this module; the corpus replaces its directory "
        "as a whole; give a directory that is empty or does not exist yet."
    )


def _publish(temporary: Path, directory: Path) -> None:
    """Rename `temporary` to `directory`, unless a current corpus is already there; an out-of-date one is removed."""
    stale = temporary.with_name(temporary.name + ".stale")
    while _load_current(directory) is None:
        try:
            # Succeeds only on a missing or empty directory, so two builders cannot mix their files.
            os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if _load_current(directory) is None:
                _refuse_foreign(directory)
                # Missing when another builder has just moved it out of the way itself.
                with contextlib.suppress(FileNotFoundError):
                    os.rename(directory, stale)
                shutil.rmtree(stale, ignore_errors=True)
