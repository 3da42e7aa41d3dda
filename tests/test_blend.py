"""The mix of data sets: exact shares, any position at once, and nothing but the position decides."""

import itertools
import math
import random
import time
from fractions import Fraction

import pytest

from mempar.errors import ConfigError
from mempar.runtime.data.blend import Blend


def weights_of(rng: random.Random, num_sets: int) -> tuple[float, ...]:
    """Weights from even to spread over six orders of magnitude, some of them equal."""
    spread = rng.choice([0.1, 1.0, 6.0])
    weights = [10 ** rng.uniform(-spread, 0) for _ in range(num_sets)]
    return tuple(rng.choice([*weights, weights[0]]) for _ in range(num_sets))


@pytest.mark.parametrize("num_sets", [1, 2, 3, 4, 7, 30, 200])
def test_samples_of_a_set_are_numbered_and_follow_its_share_at_every_prefix(num_sets: int, rng: random.Random) -> None:
    for _ in range(3):
        weights = weights_of(rng, num_sets)
        blend, total = Blend(weights), math.fsum(weights)
        counts, limit = [0] * num_sets, 1.0 if num_sets <= 3 else 1.7
        for index in range(3000):
            data_set, ordinal = blend.locate(index)
            assert ordinal == counts[data_set]
            counts[data_set] += 1
            if index % 10 == 0:
                deviations = [abs(n - weight / total * (index + 1)) for n, weight in zip(counts, weights, strict=True)]
                assert max(deviations) < limit


def test_two_sets_are_mixed_as_the_one_that_lags_most(rng: random.Random) -> None:
    for weights in [(1.0, 1.0), (0.75, 0.25), (3.0, 5.0), (rng.random() + 0.01, rng.random() + 0.01)]:
        blend = Blend(weights)
        shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        taken = [0, 0]
        for index in range(2000):
            lags = [share * (index + 1) - count for share, count in zip(shares, taken, strict=True)]
            lagging = 0 if lags[0] >= lags[1] else 1
            assert blend.locate(index) == (lagging, taken[lagging])
            taken[lagging] += 1


def test_shares_are_exact_far_out() -> None:
    blend = Blend((0.1, 0.2, 0.3, 0.4))
    far = 10**15
    seen = [blend.locate(far + step) for step in range(1000)]
    for data_set, weight in enumerate((0.1, 0.2, 0.3, 0.4)):
        mine = [ordinal for which, ordinal in seen if which == data_set]
        assert mine == list(range(mine[0], mine[0] + len(mine)))
        # The decimals are not exact in binary: 1e-16 of 1e15 samples.
        assert abs(mine[0] - weight * far) < 2


def test_order_of_the_sets_decides_nothing_but_their_numbers(rng: random.Random) -> None:
    weights = (5.0, 1.0, 3.0, 0.25)
    plain = [Blend(weights).locate(index)[0] for index in range(500)]
    for order in itertools.permutations(range(4)):
        moved = Blend(tuple(weights[data_set] for data_set in order))
        counts = [sum(order[moved.locate(index)[0]] == data_set for index in range(500)) for data_set in range(4)]
        assert all(abs(count - plain.count(data_set)) <= 2 for data_set, count in enumerate(counts))


def test_a_far_position_costs_no_more_than_a_near_one() -> None:
    blend = Blend(tuple(float(weight) for weight in range(1, 101)))
    start = time.perf_counter()
    for index in range(10**8, 10**8 + 1000):
        blend.locate(index)
    # Replaying 1e8 choices one by one takes minutes; a thousand look-ups measured 10 ms on a busy core.
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (float("nan"),), (float("inf"), 1.0)])
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        Blend(weights)
