"""mempar.tools.study.accuracy: what one forward pass says of an answer is what greedy decoding says."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mempar.runtime.bringup import tear_down
from mempar.runtime.inference.forward import Forward
from mempar.tools.study import accuracy
from mempar.tools.study.accuracy import Recall, ask
from rank_pool import RankPool
from toy import VOCAB, Session, toy_run

pytestmark = pytest.mark.usefixtures("one_thread")


def decoded(forward: Forward, question: list[int], length: int) -> tuple[list[int], float]:
    """What a model goes on with, one token at a time without any cache, and the loss of that."""
    tokens, nats = list(question), 0.0
    for _ in range(length):
        logits = forward.logits(torch.tensor([tokens]))[0, -1].double()
        tokens.append(int(logits.argmax()))
        nats -= float(torch.log_softmax(logits, -1)[tokens[-1]])
    return tokens[len(question) :], nats


def questions_and_answers(seed: int) -> dict[str, Any]:
    """On a rank: questions of many lengths, some with the answer that the model decodes."""
    session = Session(toy_run(kind="memory_plus"))
    session.step(0)
    session.model.hook_slots(None)
    forward = Forward(session.model, session.run, session.world, VOCAB)
    chooser = np.random.default_rng(seed)
    questions, expected, nats = [], [], []
    for number in range(40):
        question = chooser.integers(0, VOCAB, chooser.integers(1, 9)).tolist()
        answer, loss = decoded(forward, question, int(chooser.integers(1, 6)))
        right = number % 2 == 0
        if not right:
            # Wrong in one place, whichever: the last token of some, the first of others.
            place = int(chooser.integers(0, len(answer)))
            answer[place] = (answer[place] + 1) % VOCAB
        questions.append((question, answer))
        expected.append(right)
        nats.append(loss if right else np.nan)
    # Many passes, of alike lengths.
    with patch.object(accuracy, "_TOKENS_AT_ONCE", 64):
        found = ask(forward, questions)
    # Training goes on after an examination.
    session.step(1)
    tear_down(session.world)
    return {"found": found, "expected": expected, "nats": nats, "lengths": [len(answer) for _, answer in questions]}


def test_facts_are_recalled_where_greedy_decoding_gives_the_whole_answer(pool: RankPool, fresh_seed: int) -> None:
    (seen,) = pool.run(1, questions_and_answers, fresh_seed)
    found: Recall = seen["found"]
    assert found.right.tolist() == seen["expected"] and found.accuracy == 0.5
    decoded_nats = np.array(seen["nats"])
    right = ~np.isnan(decoded_nats)
    np.testing.assert_allclose(found.nats[right], decoded_nats[right], atol=1e-4)
    assert found.tokens.tolist() == seen["lengths"]
    assert found.loss == pytest.approx(found.nats.sum() / sum(seen["lengths"]))
