"""Requests as rows of tokens: what a model reads, and which tokens behind it are scored; no torch here.

A row serves all requests that read the same tokens: of a multiple choice with one token an answer, one is computed.
Texts are cut into tokens, and too long ones cut short, as the harness's class for transformers' models does it, so that
scores agree: context and continuation are encoded as one text and divided behind as many tokens as the context alone
has; what is too long loses its beginning.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import Encoder

# Tokens of a context, and of what is scored behind it.
Pair = tuple[list[int], list[int]]
# Pairs that a tokenizer is given at a time.
_PAIRS = 1024


@dataclass(frozen=True)
class Row:
    """One sequence that a model reads.

    Attributes:
        tokens: what it reads.
        endings: tokens to score, in as many ways as were asked for; the last of each is predicted by the last of
            `tokens`, the one before it by the last but one, and so on.
    """

    tokens: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]


def encode_texts(encoder: Encoder, texts: Iterable[str]) -> dict[str, list[int]]:
    """Tokens of texts; of equal ones once."""
    different = list(dict.fromkeys(texts))
    encoded = encoder.encode(different)
    return {text: [int(token) for token in tokens] for text, tokens in zip(different, encoded, strict=True)}


def encode_pairs(encoder: Encoder, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokens of contexts and continuations.

    Spaces at the end of a context belong to the continuation, where tokens begin with them. An empty context is the
    end of the document before.

    Raises:
        ConfigError: for a continuation that has no token of its own.
    """
    pairs = []
    for start in range(0, len(texts), _PAIRS):
        moved = [_spaces_moved(*pair) for pair in texts[start : start + _PAIRS]]
        tokens = encode_texts(encoder, [text for one, other in moved for text in (one, one + other)])
        pairs += [_divided(context, continuation, tokens, encoder.eod) for context, continuation in moved]
    return pairs


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _divided(context: str, continuation: str, tokens: dict[str, list[int]], eod: int) -> Pair:
    before = tokens[context]
    after = tokens[context + continuation][len(before) :]
    if not after:
        raise ConfigError(
            f"there is nothing to score in {continuation!r} after {context[-60:]!r}: with this tokenizer it has no "
            "token of its own; a task asks for the likelihood of texts that have some; see to the task's choices."
        )
    return before or [eod], after


def make_rows(pairs: Sequence[Pair], max_length: int) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows for pairs of context and continuation.

    Args:
        pairs: each with at least one token of either.
        max_length: tokens that a model reads at a time.

    Returns:
        The rows, and for each pair the numbers of its row and of its ending there.

    Raises:
        ConfigError: for a continuation longer than `max_length`.
    """
    endings: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    found = []
    for context, continuation in pairs:
        if len(continuation) > max_length:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens is to be scored, and the model reads {max_length} at a "
                "time (train.seq_length); it is scored as a whole; leave this task out, or take a model of longer "
                "sequences."
            )
        tokens = tuple([*context, *continuation][-(max_length + 1) : -1])
        asked = endings.setdefault(tokens, {})
        found.append((tokens, asked.setdefault(tuple(continuation), len(asked))))
    rows = [Row(tokens, tuple(asked)) for tokens, asked in endings.items()]
    numbers = {row.tokens: number for number, row in enumerate(rows)}
    return rows, [(numbers[tokens], ending) for tokens, ending in found]


def window_row(tokens: Sequence[int] | np.ndarray, start: int, prefix: int, max_length: int) -> Row:
    """The row that scores the tokens from `start` on, at most `max_length` of them.

    Args:
        tokens: of a text, or a whole data set.
        start: a multiple of `max_length`. A shorter last stretch is scored with as long a context as there is.
        prefix: what stands before the first token.
        max_length: tokens that a model reads at a time.
    """
    end = min(start + max_length, len(tokens))
    read = [int(token) for token in tokens[max(0, end - max_length - 1) : end]]
    read = [prefix, *read] if end <= max_length else read
    return Row(tuple(read[:-1]), (tuple(read[start - end :]),))


def window_rows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Row]:
    """Rows that score every token of a text once."""
    return [window_row(tokens, start, prefix, max_length) for start in range(0, len(tokens), max_length)]


def batches(lengths: Sequence[int], size_of: Callable[[int], int]) -> Iterator[list[int]]:
    """Deal sequences into batches of similar lengths, the longest first: what does not fit fails at once.

    Args:
        lengths: of the sequences.
        size_of: how many of a length a batch may have.

    Yields:
        Numbers of sequences.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    while order:
        size = max(1, size_of(lengths[order[0]]))
        yield order[:size]
        del order[:size]
