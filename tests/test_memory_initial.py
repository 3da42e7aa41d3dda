"""Initial values of a table: slices agree, and the numbers are standard normal."""

import math

import pytest
import torch

from mempar.memory import initial
from mempar.memory.initial import hashed_normal
from shards import slice_of, values_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_elements", [1, 100, 1 << 21])
def test_table_slice_equals_slice_of_whole_table(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int, dtype: torch.dtype, chunk_elements: int
) -> None:
    whole = values_of(slice_of(37, 23, (0, 37), (0, 23)), fresh_seed, dtype)
    monkeypatch.setattr(initial, "_CHUNK_ELEMENTS", chunk_elements)
    for rows in ((0, 37), (0, 13), (13, 26), (36, 37), (5, 5)):
        for columns in ((0, 23), (0, 8), (8, 23), (22, 23), (7, 7)):
            part = values_of(slice_of(37, 23, rows, columns), fresh_seed, dtype)
            assert part.dtype == dtype
            assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_table_row_is_the_same_when_table_has_more_slots(fresh_seed: int) -> None:
    small = values_of(slice_of(9, 16, (0, 9), (0, 16)), fresh_seed)
    large = values_of(slice_of(64 * 10**6, 16, (4, 9), (0, 16)), fresh_seed)
    assert torch.equal(small[4:], large)


def test_table_values_have_the_moments_of_their_distribution(fresh_seed: int) -> None:
    num_slots, value_dim = 500, 400
    values = values_of(slice_of(num_slots, value_dim, (0, num_slots), (0, value_dim)), fresh_seed)
    scaled, deviations = values * math.sqrt(value_dim), 6 / math.sqrt(values.numel())
    # Each bound is six standard deviations of its estimate from this many numbers.
    assert abs(scaled.mean()) < deviations
    assert abs(scaled.square().mean() - 1) < math.sqrt(2) * deviations
    assert abs(scaled.pow(3).mean()) < math.sqrt(15) * deviations
    assert abs(scaled.pow(4).mean() - 3) < math.sqrt(96) * deviations
    for one, other in ((scaled[1:], scaled[:-1]), (scaled[:, 1:], scaled[:, :-1])):
        assert abs((one * other).mean()) < 1.01 * deviations
        assert abs((one.square() * other.square()).mean() - 1) < 3 * deviations
    for row_bound, mean in ((num_slots, scaled.mean(0)), (value_dim, scaled.mean(1))):
        assert mean.abs().max() < 7 / math.sqrt(row_bound)
    assert values.unique().numel() == values.numel()


def test_table_values_follow_the_normal_distribution_function(fresh_seed: int) -> None:
    values = hashed_normal(fresh_seed, torch.arange(200), torch.arange(200)).flatten()
    expected = 0.5 * (1 + torch.erf(values.sort()[0] / math.sqrt(2)))
    observed = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    # Kolmogorov and Smirnov: a larger distance has a probability of about 1e-7.
    assert (expected - observed).abs().max() < 2.9 / math.sqrt(len(values))


def test_table_values_differ_when_seed_differs(fresh_seed: int) -> None:
    part = slice_of(50, 40, (0, 50), (0, 40))
    first = values_of(part, fresh_seed)
    for seed in (fresh_seed + 1, -fresh_seed - 1, fresh_seed + 2**40):
        other = values_of(part, seed)
        assert not (first == other).any()
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 6 / math.sqrt(2000)
    assert torch.equal(first, values_of(part, fresh_seed))
