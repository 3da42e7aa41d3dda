"""How many facts a model recalls: every token of an answer has to be the one that greedy decoding would take.

A model is given the question and decodes greedily; its answer is right if all of it is, to the full stop. While the
tokens so far are right, decoding sees exactly what a forward pass over question and answer sees, so one such pass says
the same: the answer is recalled if each of its tokens is the most likely one after all before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mempar.runtime.inference.forward import Forward

# Tokens of a forward pass: their logits take vocab_size times as many numbers.
_TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What a model said to some questions, in their order.

    Attributes:
        right: `[n] bool`, whether the whole answer is recalled.
        nats: `[n] float64`, negative log-likelihood of the answer.
        tokens: `[n] int64`, of the answer.
    """

    right: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the facts that are recalled."""
        return float(self.right.mean())

    @property
    def loss(self) -> float:
        """Nats a token of the answers."""
        return float(self.nats.sum() / self.tokens.sum())


def ask(forward: Forward, questions: Sequence[tuple[list[int], list[int]]]) -> Recall:
    """Ask a model.

    Args:
        forward: of the model, on one rank.
        questions: tokens of each question and of its answer, at least one of each.
    """
    lengths = [len(question) + len(answer) for question, answer in questions]
    right = np.zeros(len(questions), dtype=np.bool_)
    nats = np.zeros(len(questions))
    # Alike lengths together: little padding.
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        # The last is the longest.
        count = max(1, _TOKENS_AT_ONCE // lengths[order[min(start + _TOKENS_AT_ONCE // 8, len(order)) - 1]])
        chosen = order[start : start + count]
        right[chosen], nats[chosen] = _ask_batch(forward, [questions[place] for place in chosen])
        start += count
    return Recall(right=right, nats=nats, tokens=np.array([len(answer) for _, answer in questions]))


def _ask_batch(forward: Forward, questions: Sequence[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(question) + len(answer) for question, answer in questions)
    tokens = torch.zeros(len(questions), longest, dtype=torch.int64)
    answered = torch.zeros(len(questions), longest, dtype=torch.bool)
    for place, (question, answer) in enumerate(questions):
        tokens[place, : len(question) + len(answer)] = torch.tensor([*question, *answer])
        answered[place, len(question) : len(question) + len(answer)] = True
    # The last token predicts nothing that is asked; what follows a token does not change its logits.
    logits = forward.logits(tokens[:, :-1])
    tokens, answered = tokens[:, 1:].to(logits.device), answered[:, 1:].to(logits.device)
    wrong = (logits.argmax(-1) != tokens) & answered
    nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").double() * answered
    return (~wrong.any(-1)).cpu().numpy(), nats.sum(-1).cpu().numpy()
