"""Small parts of a step: clipping."""

import math

import pytest

from mempar.runtime.optim import clip_factor


def test_clip_factor_scales_to_the_limit_and_never_up() -> None:
    assert clip_factor(1.0, 0.5) == 1.0
    assert clip_factor(1.0, 4.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.0, 1e9) == 1.0
    assert math.isfinite(clip_factor(1.0, 0.0))
