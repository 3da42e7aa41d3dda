"""A byte trigram model by counting: the loss that a trained model has to beat before its memory says anything.

`mempar train smoke` sets this figure beside its own held-out loss. Trigram, bigram, unigram and uniform distributions
are interpolated with weights that depend on how often the context was seen, fitted by expectation maximisation on
training text that the counts leave out (deleted interpolation: Jelinek and Mercer, 1980, "Interpolated estimation of
Markov source parameters from sparse data"). Nothing is ever fitted on held-out tokens.
"""

from dataclasses import dataclass

import numpy as np

# Counts are int32 with vocab_size**3 cells: 108 MB at 300, and a second table of int64 while counting.
MAX_VOCAB_SIZE = 300

_NUM_BUCKETS = 20
_NUM_EM_STEPS = 30
_TOKENS_PER_CHUNK = 1 << 22
# Every 20th of 200 equal pieces fits the weights: 5%, from all over the text, each longer than most documents.
_NUM_PIECES = 200
_FIT_ONE_PIECE_IN = 20


@dataclass(frozen=True, kw_only=True)
class TrigramModel:
    """Trigram counts, [V, V, V] int32, oldest token first, and weights, [buckets, 4], a row a bucket of contexts."""

    counts: np.ndarray
    weights: np.ndarray

    def probability(self, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        """Return p(third | first, second) as [N] float64 for three integer arrays [N]."""
        components, buckets = self._components(first, second, third)
        return (components * self.weights[buckets]).sum(axis=1)

    def _components(self, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the four distributions at `third` ([N, 4], trigram first) and the bucket of each context ([N])."""
        bigram_counts = self.counts.sum(axis=0, dtype=np.int64)
        unigram_counts = bigram_counts.sum(axis=0)
        uniform = np.full(third.shape, 1.0 / unigram_counts.size)
        unigram = unigram_counts[third] / unigram_counts.sum()
        # A context that was never seen has no distribution of its own and takes the shorter one's.
        context = bigram_counts.sum(axis=1)[second]
        bigram = np.where(context > 0, bigram_counts[second, third] / np.maximum(context, 1), unigram)
        context = self.counts.sum(axis=2, dtype=np.int64)[first, second]
        trigram = np.where(context > 0, self.counts[first, second, third] / np.maximum(context, 1), bigram)
        # Bucket 0 is "never seen"; each further one holds counts up to twice as high.
        buckets = np.minimum(np.ceil(np.log2(context + 1)).astype(np.int64), _NUM_BUCKETS - 1)
        return np.stack([trigram, bigram, unigram, uniform], axis=1), buckets


def fit(train_tokens: np.ndarray, vocab_size: int) -> TrigramModel:
    """Return the model whose weights fit 5% of [T] `train_tokens` under counts of the rest, then counts of them all.

    Raises:
        ValueError: `vocab_size` or a token is out of range.
    """
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} needs {vocab_size**3} counts in memory; it must be from 1 to {MAX_VOCAB_SIZE}; "
            "use byte tokens or another baseline."
        )
    _check_tokens("train_tokens", train_tokens, vocab_size)
    # A trigram starts at each position but the last two.
    piece = np.arange(train_tokens.size - 2) * _NUM_PIECES // train_tokens.size
    in_fit = piece % _FIT_ONE_PIECE_IN == _FIT_ONE_PIECE_IN - 1
    rest_at, fit_at = np.flatnonzero(~in_fit), np.flatnonzero(in_fit)
    model = TrigramModel(counts=_count(train_tokens, rest_at, vocab_size), weights=np.full((_NUM_BUCKETS, 4), 0.25))
    weights = _fit_weights(model, *(train_tokens[fit_at + offset] for offset in range(3)))
    return TrigramModel(counts=model.counts + _count(train_tokens, fit_at, vocab_size), weights=weights)


def trigram_loss(train_tokens: np.ndarray, heldout_tokens: np.ndarray, vocab_size: int) -> float:
    """Return the mean negative log-likelihood, in nats per token, of `heldout_tokens` under a model of `train_tokens`.

    The first two tokens of a held-out window are context only. Takes a few seconds and about
    0.5 GB for 15 million byte tokens.

    Args:
        train_tokens: `[n]` integers below `vocab_size`, at least 3.
        heldout_tokens: `[n]` or `[windows, n]`, likewise.
        vocab_size: number of different tokens; ValueError above `MAX_VOCAB_SIZE`.
    """
    model = fit(train_tokens, vocab_size)
    _check_tokens("heldout_tokens", heldout_tokens.ravel(), vocab_size)
    first, second, third = heldout_tokens[..., :-2], heldout_tokens[..., 1:-1], heldout_tokens[..., 2:]
    probability = model.probability(first.ravel(), second.ravel(), third.ravel())
    return float(-np.log(probability).mean())


def _count(tokens: np.ndarray, starts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return how often each trigram begins at one of the positions `starts`: [V, V, V] int32."""
    counts = np.zeros(vocab_size**3, dtype=np.int32)
    # In chunks, as the cell numbers are eight bytes each.
    for begin in range(0, starts.size, _TOKENS_PER_CHUNK):
        at = starts[begin : begin + _TOKENS_PER_CHUNK]
        cells = tokens[at].astype(np.int64)
        for offset in (1, 2):
            cells = cells * vocab_size + tokens[at + offset]
        counts += np.bincount(cells, minlength=counts.size).astype(np.int32)
    return counts.reshape(vocab_size, vocab_size, vocab_size)


def _fit_weights(model: TrigramModel, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    """Return the interpolation weights [buckets, 4] that expectation maximisation finds on these trigrams."""
    weights, (components, buckets) = model.weights, model._components(first, second, third)
    for _ in range(_NUM_EM_STEPS):
        shares = components * weights[buckets]
        shares /= shares.sum(axis=1, keepdims=True)
        # A tenth of an observation made up for each component keeps every weight, and so every probability, above zero.
        totals = np.stack([np.bincount(buckets, share, minlength=_NUM_BUCKETS) + 0.1 for share in shares.T], axis=1)
        weights = totals / totals.sum(axis=1, keepdims=True)
    return weights


def _check_tokens(name: str, tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.ndim != 1 or tokens.size < 3 or tokens.min() < 0 or tokens.max() >= vocab_size:
        ends = (int(tokens.min()), int(tokens.max())) if tokens.size else "no tokens"
        raise ValueError(
            f"{name} has shape {tokens.shape} and least and greatest token {ends}; it must be flat, of 3 tokens or "
            f"more, from 0 to {vocab_size - 1}; pass the token array and the vocabulary size of its tokenizer."
        )
