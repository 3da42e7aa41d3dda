"""Sentences into documents of one length, so that a sample is a document and no sentence is cut.

Megatron cuts a stream of tokens into samples wherever they end. Documents that are exactly as long as a sample keep
sentences whole, in whatever order they come; what no sentence fits in is filled with ends of documents.
"""

from collections.abc import Sequence

import numpy as np

# Sentences that are looked at for one that fits.
_LOOK_AHEAD = 64


def pack(sentences: Sequence[np.ndarray], order: np.ndarray, length: int, end: int) -> np.ndarray:
    """Fill documents with whole sentences, nearly in an order.

    Args:
        sentences: tokens of each.
        order: `[n] int`, numbers of sentences, each to be placed once.
        length: tokens of a document; every sentence is shorter.
        end: the token that ends a document and fills it up.

    Returns:
        `[documents, length] int`, every document ending with at least one `end`.
    """
    lengths = [len(sentence) for sentence in sentences]
    # At the end, because taking from there is cheap.
    waiting = order[::-1].tolist()
    documents = []
    while waiting:
        parts, room = [], length - 1
        while waiting:
            place = _fitting(waiting, lengths, room)
            if place is None:
                break
            chosen = waiting.pop(place)
            parts.append(sentences[chosen])
            room -= lengths[chosen]
        assert parts, f"a sentence of {lengths[waiting[-1]]} tokens fits in no document of {length}"
        documents.append(np.concatenate([*parts, np.full(room + 1, end)]))
    return np.stack(documents)


def _fitting(waiting: list[int], lengths: list[int], room: int) -> int | None:
    """Where the next sentence stands: the first one, or else the longest of those behind it that fits."""
    if lengths[waiting[-1]] <= room:
        return len(waiting) - 1
    behind = range(max(0, len(waiting) - _LOOK_AHEAD), len(waiting) - 1)
    fitting = [place for place in behind if lengths[waiting[place]] <= room]
    return max(fitting, key=lambda place: (lengths[waiting[place]], place), default=None)
