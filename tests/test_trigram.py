"""The counting baseline against brute force, and at the losses that theory gives."""

import math
from collections import Counter

import numpy as np
import pytest

from mempar.runtime.data import trigram


def _ratio(numerator: int, denominator: int, fallback: float) -> float:
    return numerator / denominator if denominator else fallback


def _brute_force(tokens: list[int], vocab_size: int, context: tuple[int, int], weights: np.ndarray) -> list[float]:
    """p(. | context) by the definition, with sums over a Counter of trigrams."""
    counts = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    seen = sum(number for triple, number in counts.items() if triple[:2] == context)
    row = weights[min(math.ceil(math.log2(seen + 1)), len(weights) - 1)]
    probabilities = []
    for token in range(vocab_size):
        unigram = sum(number for triple, number in counts.items() if triple[2] == token) / counts.total()
        after_second = sum(number for triple, number in counts.items() if triple[1] == context[1])
        both = sum(number for triple, number in counts.items() if triple[1:] == (context[1], token))
        bigram = _ratio(both, after_second, unigram)
        full = _ratio(counts[*context, token], seen, bigram)
        probabilities.append(float(row @ [full, bigram, unigram, 1 / vocab_size]))
    return probabilities


def _all_contexts(vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, third = np.indices((vocab_size,) * 3).reshape(3, -1)
    return first, second, third


@pytest.mark.parametrize("num_tokens", [3, 37, 1000])
def test_probability_matches_brute_force_and_sums_to_one(num_tokens: int) -> None:
    vocab_size = 5
    # The last token never occurs, so that contexts without any count are among those compared.
    tokens = np.random.default_rng(num_tokens).integers(0, vocab_size - 1, num_tokens)
    model = trigram.fit(tokens.astype(np.uint16), vocab_size)
    got = model.probability(*_all_contexts(vocab_size)).reshape((vocab_size,) * 3)
    for first in range(vocab_size):
        for second in range(vocab_size):
            want = _brute_force(tokens.tolist(), vocab_size, (first, second), model.weights)
            np.testing.assert_allclose(got[first, second], want, rtol=1e-12)
    np.testing.assert_allclose(got.sum(axis=2), 1.0, rtol=1e-12)
    assert (got > 0).all()


def test_loss_near_entropy_when_next_token_depends_on_the_last_alone() -> None:
    # Counts of trigrams cost 8 * 8 * 7 parameters / (2 * 100,000 tokens) = 0.0022 nats here, those of bigrams 0.0003,
    # and 0.0027 was measured.
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(8, 0.3), size=8)
    tokens = [0]
    for _ in range(110_000):
        tokens.append(int(rng.choice(8, p=table[tokens[-1]])))
    train, heldout = np.array(tokens[:100_000]), np.array(tokens[100_000:])
    truth = -np.log(table[heldout[1:-1], heldout[2:]]).mean()
    assert truth < trigram.trigram_loss(train, heldout, 8) < truth + 0.005


def test_loss_near_zero_when_sequence_is_cyclic() -> None:
    tokens = np.arange(20_000, dtype=np.uint16) % 7
    assert trigram.trigram_loss(tokens, tokens[:500], 7) < 0.01


def test_loss_near_log_vocab_when_tokens_are_uniform() -> None:
    rng = np.random.default_rng(1)
    train, heldout = rng.integers(0, 257, 200_000), rng.integers(0, 257, 20_000)
    assert trigram.trigram_loss(train, heldout, 257) == pytest.approx(math.log(257), abs=0.01)


def test_loss_is_finite_when_heldout_tokens_were_never_seen() -> None:
    loss = trigram.trigram_loss(np.zeros(1000, dtype=np.uint16), np.array([1, 2, 3], dtype=np.uint16), 4)
    assert math.log(4) < loss < math.inf


def test_counts_hold_every_trigram_when_chunks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(2).integers(0, 4, 101).astype(np.uint16)
    monkeypatch.setattr(trigram, "_TOKENS_PER_CHUNK", 8)
    counts = trigram.fit(tokens, 4).counts
    expected = Counter(zip(tokens.tolist(), tokens[1:].tolist(), tokens[2:].tolist(), strict=False))
    assert {cell: int(counts[cell]) for cell in zip(*np.nonzero(counts), strict=True)} == expected


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "words"),
    [
        ([0, 1, 2], 301, "counts in memory"),
        ([0, 1, 2], 0, "from 1 to 300"),
        ([0, 1, 4], 4, "from 0 to 3"),
        ([0, -1, 2], 4, "from 0 to 3"),
        ([0, 1], 4, "3 tokens or more"),
        ([], 4, "no tokens"),
    ],
)
def test_fit_refuses_what_it_cannot_count(tokens: list[int], vocab_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trigram.trigram_loss(np.array(tokens, dtype=np.int64), np.array([0, 1, 2]), vocab_size)
