"""Short answers compared with the right ones, as SQuAD's evaluation does: exact match, and F1 over words.

Named by tasks/*.yaml, and called by the harness.
"""

import re
import string
from collections import Counter
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> list[str]:
    """The words of an answer: small letters, without punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, right: str) -> float:
    """1 where the words are the same, else 0."""
    return float(normalised(answer) == normalised(right))


def f1(answer: str, right: str) -> float:
    """The harmonic mean of the shares of right words in the answer and of the right answer's words that are there."""
    given, wanted = normalised(answer), normalised(right)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What the harness asks of a task: the metrics of one document.

    Args:
        doc: with its `answer`.
        results: what the model wrote.
    """
    (written,) = results
    return {"exact_match": exact_match(written, doc["answer"]), "f1": f1(written, doc["answer"])}
