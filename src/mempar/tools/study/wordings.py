"""Facts as sentences. Every kind of fact has several wordings, and every fact is asked in one that it is never told in.

A wording that is held out for one fact is told of others of its kind, so that what is asked for is the fact and not
the wording. Sentences end with the answer: a question is a sentence without it, and whoever knows the fact goes on
with the answer.
"""

import hashlib
from dataclasses import dataclass

from mempar.tools.study.facts import BLOCK, CATEGORY, CODE_POINT, DECOMPOSITION, NAME, VALUE, Fact

WORDINGS = {
    NAME: (
        "{} is named",
        "The name of {} is",
        "What is {} called?",
        "Unicode calls {}",
    ),
    CODE_POINT: (
        "{} is at",
        "The code point of {} is",
        "Where is {}?",
        "Unicode puts {} at",
    ),
    CATEGORY: (
        "{} is in the category",
        "The category of {} is",
        "Of which category is {}?",
        "Unicode counts {} among",
    ),
    BLOCK: (
        "{} is in the block",
        "The block of {} is",
        "To which block belongs {}?",
        "Unicode has {} in the block",
    ),
    VALUE: (
        "{} has the value",
        "The value of {} is",
        "How much is {}?",
        "Unicode gives {} the value",
    ),
    DECOMPOSITION: (
        "{} is made of",
        "The decomposition of {} is",
        "What is in {}?",
        "Unicode takes {} apart into",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A fact in one wording, in two parts that are turned into tokens apart.

    Attributes:
        question: the sentence up to the answer.
        answer: the rest, with the full stop that ends it.
    """

    question: str
    answer: str


def held_out(fact: Fact, seed: int) -> int:
    """The wording in which a fact is asked and never told, by its number."""
    digest = hashlib.sha256(f"{seed} {fact.kind} {fact.subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(WORDINGS[fact.kind])


def told(fact: Fact, seed: int) -> list[int]:
    """The wordings in which a fact is told."""
    return [wording for wording in range(len(WORDINGS[fact.kind])) if wording != held_out(fact, seed)]


def sentence(fact: Fact, wording: int) -> Sentence:
    """Put a fact into words; sentences follow each other as they are."""
    return Sentence(question=f" {WORDINGS[fact.kind][wording].format(fact.subject)}", answer=f" {fact.answer}.")
