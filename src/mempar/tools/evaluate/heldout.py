"""The loss of a model on prepared data, in nats a token and in bits a byte of text.

The data are one stream of tokens, as in training: windows of `train.seq_length` tokens follow each other across the
ends of documents, every token is predicted once, and the first of a window by the one before it (by the end of a
document, for the first of all). Of a bounded number of windows, these lie evenly over the data.

Bytes are those of the text that the tokens stand for, so models with different tokenizers can be compared. Ends of
documents are predicted like other tokens and have no bytes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import check_tokens
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.data.manifest import read_index
from mempar.runtime.data.one_prefix import run_on_prefix
from mempar.tools.evaluate.rows import Row, window_row

# Tokens decoded before a stretch, so that a character that is cut by its beginning is cut in both.
_BEFORE = 8


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss on one data set.

    Attributes:
        data: its prefix.
        tokens: that were predicted.
        num_bytes: of text that they stand for; None where the tokenizer is not there to say it.
        nats: of all of them.
        windows: that were read.
        all_windows: that the data have.
    """

    data: str
    tokens: int
    num_bytes: int | None
    nats: float
    windows: int
    all_windows: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss, comparable with `heldout_loss` of training."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


def open_tokens(prefix: str, run: RunConfig, embeddings: int) -> np.ndarray:
    """Tokens of prepared data, left on the disk.

    Args:
        prefix: of the .bin and .idx files, which exist.
        run: of the model.
        embeddings: that the model has.

    Raises:
        ConfigError: for files that are cut short, and tokens that are not the model's.
    """
    run_on_prefix(run, prefix, embeddings)
    index = read_index(prefix)
    if not index.tokens:
        raise ConfigError(f"--data {prefix} holds no tokens; a loss needs some; name other data.")
    return np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r", shape=(index.tokens,))


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A data set that is to be scored.

    Attributes:
        data: its prefix.
        tokens: `[n]`, all of it.
        eod: what stands before the first token.
        encoder: the tokenizer, for the bytes; None where it cannot be loaded.
        max_length: tokens that a model reads at a time.
        embeddings: that the model has.
    """

    data: str
    tokens: np.ndarray
    eod: int
    encoder: Encoder | None
    max_length: int
    embeddings: int

    @property
    def num_windows(self) -> int:
        """Windows that make up the data."""
        return -(-len(self.tokens) // self.max_length)

    def starts(self, samples: int | None) -> list[int]:
        """First tokens of the windows to read: of all of them, or of `samples` that lie evenly."""
        count = self.num_windows
        if samples is None or samples >= count:
            return list(range(0, len(self.tokens), self.max_length))
        return [int((place + 0.5) * count / samples) * self.max_length for place in range(samples)]

    def row(self, start: int) -> Row:
        """The row that scores a window.

        Raises:
            ConfigError: for a token that has no embedding.
        """
        check_tokens(self.data, self.tokens[start : start + self.max_length], self.embeddings)
        return window_row(self.tokens, start, self.eod, self.max_length)


def measure(
    stream: Stream,
    *,
    samples: int | None,
    batch_size: int,
    score: Callable[[Iterator[list[Row]]], Iterator[list[float]]],
) -> Loss:
    """Measure the loss on one data set.

    Args:
        stream: the data set.
        samples: windows to read at the most; None for all.
        batch_size: windows in a batch.
        score: computes the logarithm of the likelihood of each row's ending, batch by batch.
    """
    starts = stream.starts(samples)
    parts = [starts[place : place + batch_size] for place in range(0, len(starts), batch_size)]
    nats = -math.fsum(math.fsum(scores) for scores in score([stream.row(start) for start in part] for part in parts))
    ends = [min(start + stream.max_length, len(stream.tokens)) for start in starts]
    num_bytes = None
    if stream.encoder is not None:
        stretches = zip(starts, ends, strict=True)
        num_bytes = sum(text_bytes(stream.tokens, start, end, stream.encoder) for start, end in stretches)
    return Loss(
        data=stream.data,
        tokens=sum(ends) - sum(starts),
        num_bytes=num_bytes,
        nats=nats,
        windows=len(starts),
        all_windows=stream.num_windows,
    )


def text_bytes(tokens: np.ndarray, start: int, end: int, encoder: Encoder) -> int:
    """Bytes of the text of the tokens from `start` up to `end`.

    Stretches that follow each other add up to the whole text, though characters may be cut between them.
    """
    own = np.asarray(tokens[max(0, start - _BEFORE) : end])
    first = min(start, _BEFORE)
    # Documents are decoded apart: some tokenizers treat the beginning of a text in a way of its own.
    ends = np.flatnonzero(own == encoder.eod).tolist()
    total = 0
    for begin, stop in zip([0, *(place + 1 for place in ends)], [*ends, len(own)], strict=True):
        total += _decoded_bytes(encoder, own[begin:stop])
        if begin < first:
            total -= _decoded_bytes(encoder, own[begin : min(stop, first)])
    return total


def _decoded_bytes(encoder: Encoder, tokens: np.ndarray) -> int:
    return len(encoder.decode(tokens.tolist()).encode(errors="surrogatepass")) if tokens.size else 0
