"""Contests: what is wrong is seen, and times are of single calls in turns."""

import math
from dataclasses import replace

import pytest
import torch

from mempar.kernels import contest
from mempar.kernels.contest import SHAPES, Contest, Roofline, Times, largest_error, measure_roofline, time_in_turns

CPU = torch.device("cpu")
TRUTH = torch.tensor([1.0, -4.0, 2.0])


@pytest.mark.parametrize(
    ("ours", "error"),
    [
        (TRUTH, 0.0),
        (TRUTH + torch.tensor([0.0, 0.0, 0.5]), 0.125),
        (TRUTH * torch.tensor([1.0, 1.0, math.nan]), math.nan),
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_largest_difference_is_relative_to_the_largest_number(
    ours: torch.Tensor, error: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "_COMPARED", at_once)
    held = Contest(name="sum", ours=lambda: (ours, TRUTH), truth=lambda: [TRUTH, TRUTH])
    assert largest_error(held) == pytest.approx(error, nan_ok=True)
    assert largest_error(replace(held, truth=None)) is None
    assert largest_error(replace(held, ours=lambda: None, sample=lambda: (ours, TRUTH))) == pytest.approx(
        error, nan_ok=True
    )


def test_what_is_not_a_number_stays_wrong_when_right_numbers_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "_COMPARED", 1)
    spoiled = Contest(name="sum", ours=lambda: TRUTH * torch.tensor([math.nan, 1.0, 1.0]), truth=lambda: TRUTH)
    assert math.isnan(largest_error(spoiled))


def test_results_of_other_shapes_are_wrong() -> None:
    with pytest.raises(AssertionError, match="sum: shapes differ"):
        largest_error(Contest(name="sum", ours=lambda: TRUTH, truth=lambda: TRUTH[:2]))


def test_sides_take_turns() -> None:
    called: list[str] = []
    times = time_in_turns({name: lambda name=name: called.append(name) for name in ("ours", "torch")}, CPU)
    # Twice each to warm up.
    assert called[4:] == ["ours", "torch"] * len(times["ours"].seconds)
    assert times["torch"].seconds == sorted(times["torch"].seconds)


def test_quantiles_are_times_that_were_measured() -> None:
    times = Times(seconds=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert (times.quantile(0.2), times.median, times.quantile(0.8), times.quantile(1.0)) == (2.0, 3.0, 5.0, 5.0)


def test_roofline_is_the_longer_of_bytes_and_flops() -> None:
    roofline = Roofline(bytes_per_s=10.0, flops_per_s=100.0)
    assert roofline.seconds(Contest(name="", ours=lambda: None, num_bytes=20, num_flops=100)) == 2.0
    assert roofline.seconds(Contest(name="", ours=lambda: None, num_bytes=20, num_flops=400)) == 4.0
    measured = measure_roofline(CPU, torch.float32)
    assert 1e8 < measured.bytes_per_s < 1e13
    assert measured.flops_per_s > 1e8


def test_tables_fit_into_the_bytes_they_are_given() -> None:
    shape = SHAPES["8b"]
    assert shape.rows_within(1 << 50) == 4096**2
    assert shape.rows_within(8 << 20) == 1024
    assert shape.reads == 128
