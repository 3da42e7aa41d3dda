"""What is computed where a model is open: likelihoods of rows, continuations of prompts.

Functions of a model and one batch, which `workers.py` calls in this process or another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.runtime.data.encoders import Encoder
from mempar.runtime.inference.generation import generate
from mempar.runtime.inference.opened import OpenedModel
from mempar.runtime.inference.sampling import Sampling
from mempar.tools.evaluate.rows import Row

# Logarithm of the likelihood of an ending, and whether each of its tokens is the likeliest.
Score = tuple[float, bool]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts to continue.

    Attributes:
        tokens: of each prompt.
        max_new_tokens: of each continuation.
        until: texts that end one.
        sampling: how tokens are chosen.
    """

    tokens: list[list[int]]
    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


def score_rows(opened: OpenedModel, rows: Sequence[Row]) -> list[list[Score]]:
    """Score the endings of each row, in nats."""
    lengths = [len(row.tokens) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : lengths[place]] = torch.tensor(row.tokens)
    # Training normalises over the embeddings that pad the vocabulary, and exported models have them.
    logits = opened.forward.logits(tokens, padded=True)
    return [
        [_score(own[length - len(ending) : length], ending) for ending in row.endings]
        for row, length, own in zip(rows, lengths, logits, strict=True)
    ]


def _score(logits: Tensor, ending: tuple[int, ...]) -> Score:
    """Score tokens by the logits `[n, V]` of what comes before each."""
    wanted = torch.tensor(ending, device=logits.device)
    likelihood = logits.gather(-1, wanted[:, None]).squeeze(-1).double() - logits.logsumexp(-1).double()
    return float(likelihood.sum()), bool((logits.argmax(-1) == wanted).all())


def continue_prompts(opened: OpenedModel, prompts: Prompts) -> list[str]:
    """Continue prompts up to the first of the texts that end one, which is left out, or the end of the document."""
    encoder = opened.encoder
    written: list[list[int]] = [[] for _ in prompts.tokens]

    def is_over(place: int, token: int) -> bool:
        written[place].append(token)
        return _ends(encoder, written[place], prompts.until)

    generate(
        opened.forward,
        prompts.tokens,
        max_new_tokens=prompts.max_new_tokens,
        vocab_size=encoder.vocab_size,
        sampling=prompts.sampling,
        stop_tokens=(encoder.eod,),
        on_token=is_over,
    )
    return [cut(encoder.decode(tokens), prompts.until) for tokens in written]


def _ends(encoder: Encoder, tokens: list[int], until: tuple[str, ...]) -> bool:
    """Whether one of the texts stands at the end of the tokens."""
    if not until:
        return False
    # A token is a byte at the least, and one before may hold the beginning of the first character.
    tail = encoder.decode(tokens[-max(len(text.encode()) for text in until) - 1 :])
    return any(text in tail for text in until)


def cut(text: str, until: tuple[str, ...]) -> str:
    """What stands before the first of the texts that end it."""
    for end in until:
        text = text.split(end)[0]
    return text
