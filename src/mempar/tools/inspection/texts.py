"""Texts to be read, as windows of tokens that the model's context holds."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.data.one_prefix import check_prefix, run_on_prefix
from mempar.runtime.inference.tokens import encoder_of, padded_vocab
from mempar.runtime.named_path import is_file
from mempar.tools.given_text import check_unicode, read_text

# Letters of a file that are read for each token that is wanted of it: more than any tokenizer takes for one on average.
_LETTERS_A_TOKEN = 16
# Letters of a text that stand for it.
_NAME = 40
# What a space and ends of lines are shown as.
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A text that is asked for.

    Attributes:
        kind: `text`, `file` or `data`.
        source: the text itself, the file's path, or the prefix of prepared data.
    """

    kind: str
    source: str

    @property
    def option(self) -> str:
        """As it is given on the command line."""
        return f"--{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A text in tokens.

    Attributes:
        name: for people.
        tokens: of each window.
        left_out: what is not among them, in words; empty if nothing is.
        shown: letters of the tokens of the first window.
    """

    name: str
    tokens: list[list[int]]
    left_out: str
    shown: list[str]


def check_asked(texts: Sequence[Asked]) -> None:
    """Refuse texts of which one can see beforehand that they cannot be read.

    Raises:
        ConfigError: for more than two, empty ones, and files that are not there.
    """
    if len(texts) > 2:
        raise ConfigError(
            f"{len(texts)} texts are given ({', '.join(each.option for each in texts)}); one is looked at, or two are "
            "compared; leave the others out."
        )
    for each in texts:
        if each.kind == "text" and not each.source:
            raise _empty(each)
        if each.kind == "text":
            check_unicode(each.source, "--text")
        if each.kind == "file" and not is_file(each.source, "--file"):
            raise ConfigError(f"--file {each.source}: there is no such file; it is a text file in UTF-8; name one.")
        if each.kind == "data":
            check_prefix(each.source, "--data")


class Texts:
    """Texts in the tokens of a checkpoint's run; neither the model nor megatron is needed for it."""

    def __init__(self, manifest: Manifest, run: RunConfig) -> None:
        """Take a checkpoint.

        Args:
            manifest: of the checkpoint.
            run: that wrote it.
        """
        self.manifest, self.run = manifest, run

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The tokenizer.

        Raises:
            ConfigError: when it cannot be loaded, or is seen to be another one than the checkpoint's; see `encoder_of`.
        """
        return encoder_of(self.manifest, self.run)

    def windows(self, asked: Asked, number: int) -> Windows:
        """Cut a text into windows of the model's context.

        Args:
            asked: the text.
            number: windows at the most.

        Raises:
            ConfigError: when the text is empty or no text, the tokenizer cannot be loaded, or data are of another one.
        """
        if asked.kind == "data":
            return self._of_data(asked, number)
        length = self.run.train.seq_length
        text, whole = _text_of(asked, number * length * _LETTERS_A_TOKEN)
        (tokens,) = self.encoder.encode([text])
        if not len(tokens):
            raise _empty(asked)
        found = [int(token) for token in tokens]
        kept = found[: number * length]
        windows = [kept[start : start + length] for start in range(0, len(kept), length)]
        left_out = ""
        if len(kept) < len(found) or not whole:
            so_many = f"{len(found) - len(kept):,} tokens" if whole else "the rest of the file"
            left_out = f"{so_many} after the first {number} window{'s' if number > 1 else ''} of {length}"
        return Windows(
            name=_name(asked, text),
            tokens=windows,
            left_out=left_out,
            shown=[letters(self.encoder, token) for token in windows[0]],
        )

    def _of_data(self, asked: Asked, number: int) -> Windows:
        """The first samples in the order in which a run with this seed would read them."""
        from mempar.runtime.data.samples import Samples

        run = run_on_prefix(self.run, asked.source, padded_vocab(self.manifest))
        samples = Samples(run, run.data.paths, (), run.train.seed)
        available = len(samples.sets[0])
        windows = [samples[place][:-1].tolist() for place in range(min(number, available))]
        try:
            shown = [letters(self.encoder, token) for token in windows[0]]
        except ConfigError:
            # Tokens are there without it; they only have no letters.
            shown = [str(token) for token in windows[0]]
        return Windows(
            name=printable(asked.source),
            tokens=windows,
            left_out=f"{available - number:,} of {available:,} samples" if available > number else "",
            shown=shown,
        )


def printable(text: str) -> str:
    """A name as it can be shown on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def letters(encoder: Encoder, token: int) -> str:
    """A token as it can be shown: spaces and ends of lines by signs, what cannot be printed by its code."""
    if token == encoder.eod:
        return "<end>"
    text = encoder.decode([token])
    return "".join(
        _SHOWN.get(letter) or (letter if letter.isprintable() else f"\\x{ord(letter):02x}") for letter in text
    )


def _text_of(asked: Asked, most: int) -> tuple[str, bool]:
    """A text, and whether that is all of it."""
    if asked.kind == "text":
        return asked.source, True
    return read_text(Path(asked.source), f"--file {asked.source}", most)


def _name(asked: Asked, text: str) -> str:
    if asked.kind == "file":
        return printable(asked.source)
    shown = printable(" ".join(text.splitlines()))
    return f'"{shown}"' if len(shown) <= _NAME else f'"{shown[: _NAME - 1]}…"'


def _empty(asked: Asked) -> ConfigError:
    name = "--text" if asked.kind == "text" else f"{asked.option} {asked.source}"
    return ConfigError(f"{name} is empty; a text of at least one token is read; give one that has some.")
