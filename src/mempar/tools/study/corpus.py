"""The study's data: facts, a tokenizer, and as many told sentences as a run reads, in files that training takes.

    facts.jsonl          one fact a line: kind, subject, answer, the wording that it is asked in
    tokenizer/           tokenizer.json
    train.bin .idx .json documents of told sentences (`packing.py`), as `mempar prepare` would have written them

Every pass tells every fact once, in the next of its wordings, in a new order; nothing is read twice in the same
company. The files are the same for the same settings and the same version of Unicode.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.config import DataConfig, RunConfig, TrainConfig
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.manifest import read_manifest
from mempar.runtime.data.tokenizer import TokenizerSpec
from mempar.runtime.durable import replace_file
from mempar.runtime.preflight import check_data
from mempar.tools.prepare.encoding import Encoded
from mempar.tools.prepare.manifest import command_of, describe
from mempar.tools.prepare.partial import Partial, partial_directory
from mempar.tools.prepare.segments import Position
from mempar.tools.study.facts import Fact, draw_facts, sources
from mempar.tools.study.packing import pack
from mempar.tools.study.settings import Settings
from mempar.tools.study.tokenizer import train_tokenizer
from mempar.tools.study.wordings import WORDINGS, held_out, sentence, told

FACTS, TOKENIZER, TRAIN = "facts.jsonl", "tokenizer", "train"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A fact and the wording in which it is asked, and was never told.

    Attributes:
        fact: the fact.
        wording: number of the wording.
    """

    fact: Fact
    wording: int


def build(directory: Path, settings: Settings) -> int:
    """Write the data of a study, or what is missing of them.

    Returns:
        Tokens of its tokenizer.

    Raises:
        ConfigError: when there are not so many facts, a sentence is longer than a document, a package is missing, or
            what is there is damaged.
        OSError: when it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    facts = draw_facts(settings.facts, settings.fact_seed)
    texts = [sentence(fact, wording) for fact in facts for wording in told(fact, settings.fact_seed)]
    spec = TokenizerSpec("hf", str(directory / TOKENIZER))
    if not (directory / TOKENIZER / "tokenizer.json").exists():
        train_tokenizer([text.question + text.answer for text in texts], settings.vocab_size, directory / TOKENIZER)
    with _sound(directory):
        encoder = load_encoder(spec)
    asked = [Asked(fact=fact, wording=held_out(fact, settings.fact_seed)) for fact in facts]
    facts_file, content = directory / FACTS, "".join(map(_line, asked)).encode()
    if not facts_file.exists():
        replace_file(facts_file, content)
    elif facts_file.read_bytes() != content:
        raise _damaged(directory, f"{facts_file} holds other facts than these settings make")
    with _sound(directory):
        missing = read_manifest(directory / TRAIN) is None
    if missing:
        _write(directory / TRAIN, spec, encoder, settings, facts)
    with _sound(directory):
        check_data(RunConfig(data=data_of(directory), train=TrainConfig(seq_length=settings.seq_length)))
    return encoder.vocab_size


@contextmanager
def _sound(directory: Path) -> Iterator[None]:
    """Say of a file that is not as it was written what to do about it here."""
    try:
        yield
    except ConfigError as error:
        raise _damaged(directory, str(error).partition(";")[0]) from None


def _damaged(directory: Path, what: str) -> ConfigError:
    return ConfigError(
        f"the corpus of the study is damaged: {what}; all runs read what was once written; delete {directory}, and the "
        "same command makes it again."
    )


def data_of(directory: Path) -> DataConfig:
    """What a run takes its tokens from."""
    return DataConfig(paths=(str(directory / TRAIN),), tokenizer=f"hf:{directory / TOKENIZER}")


def checksums(directory: Path) -> dict[str, str]:
    """What tells this corpus from another, by the names of its files; it has been built."""
    manifest = read_manifest(directory / TRAIN)
    assert manifest is not None
    files = (FACTS, f"{TOKENIZER}/tokenizer.json")
    found = {name: f"sha256:{hashlib.sha256((directory / name).read_bytes()).hexdigest()}" for name in files}
    return found | {f"{TRAIN}.bin": f"xxh3_128:{manifest.bin.xxh3_128}"}


def load_asked(directory: Path) -> list[Asked]:
    """Read the facts of a study and how they are asked."""
    found = []
    for line in (directory / FACTS).read_text().splitlines():
        row = json.loads(line)
        fact = Fact(kind=row["kind"], subject=row["subject"], answer=row["answer"])
        found.append(Asked(fact=fact, wording=WORDINGS[fact.kind].index(row["asked"])))
    return found


def _line(asked: Asked) -> str:
    fact = asked.fact
    row = {"kind": fact.kind, "subject": fact.subject, "answer": fact.answer}
    return json.dumps({**row, "asked": WORDINGS[fact.kind][asked.wording]}) + "\n"


def encode(encoder: Encoder, asked: list[Asked]) -> list[tuple[list[int], list[int]]]:
    """Tokens of questions and of their answers; a question's and its answer's make up the sentence."""
    texts = [sentence(one.fact, one.wording) for one in asked]
    questions = encoder.encode([text.question for text in texts])
    answers = encoder.encode([text.answer for text in texts])
    return [(list(question), list(answer)) for question, answer in zip(questions, answers, strict=True)]


def _write(prefix: Path, spec: TokenizerSpec, encoder: Encoder, settings: Settings, facts: list[Fact]) -> None:
    # What an interruption has left is quickly made again.
    shutil.rmtree(partial_directory(prefix), ignore_errors=True)
    options = {"corpus": "recall", "facts": settings.facts, "fact_seed": settings.fact_seed, **sources()}
    wanted = describe(str(spec), encoder, [], options)
    partial = Partial(prefix, command_of(wanted), np.dtype(wanted.dtype))
    try:
        # One more than a run has samples: the last token of a sample is labelled by the first of the next.
        most = settings.steps * settings.batch_size + 1
        for number, documents in enumerate(_passes(encoder, settings, facts)):
            documents = documents[:most].astype(partial.dtype)
            lengths = np.full(len(documents), settings.seq_length, dtype=np.int64)
            ends = np.ones(len(documents), dtype=np.bool_)
            encoded = Encoded(tokens=documents.reshape(-1), lengths=lengths, ends=ends, empty=0, bad=())
            partial.add(encoded, Position(line=number + 1), 0)
            most -= len(documents)
            if not most:
                break
        partial.finish(wanted)
    finally:
        partial.close()


def _passes(encoder: Encoder, settings: Settings, facts: list[Fact]) -> Iterator[np.ndarray]:
    """Documents `[n, seq_length]` of pass after pass, without end."""
    told_of = [[Asked(fact=fact, wording=one) for one in told(fact, settings.fact_seed)] for fact in facts]
    parts = iter(encode(encoder, list(itertools.chain.from_iterable(told_of))))
    sentences = [[np.array(list(itertools.chain(*next(parts)))) for _ in each] for each in told_of]
    longest = max(len(each) for wordings in sentences for each in wordings)
    if longest >= settings.seq_length:
        raise ConfigError(
            f"seq_length={settings.seq_length} is too short for a sentence of {longest} tokens; a document holds whole "
            "sentences and an end; raise seq_length, or vocab_size, which makes sentences shorter."
        )
    chooser = np.random.default_rng([settings.fact_seed, 0])
    first = chooser.permutation(len(facts))
    for number in itertools.count():
        now = [each[(turn + number) % len(each)] for each, turn in zip(sentences, first, strict=True)]
        yield pack(now, chooser.permutation(len(facts)), settings.seq_length, encoder.eod)
