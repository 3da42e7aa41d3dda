"""Small parts of a step: clipping."""

import math

import pytest

from mempar.runtime.config import OptimConfig
from mempar.runtime.optim import clip_factor, clip_factors
from toy import toy_run


def test_clip_factor_scales_to_the_limit_and_never_up() -> None:
    assert clip_factor(1.0, 0.5) == 1.0
    assert clip_factor(1.0, 4.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.0, 1e9) == 1.0
    assert math.isfinite(clip_factor(1.0, 0.0))


def test_clip_limits_both_norms_or_the_joint_one() -> None:
    own = toy_run(memory={"clip_grad": 2.0})
    assert own.optim == OptimConfig(lr=3e-4) and own.optim.clip_grad == 1.0
    assert clip_factors(own, 3.0, {"memory": 4.0}) == (clip_factor(1.0, 3.0), {"memory": clip_factor(2.0, 4.0)})
    joint = toy_run(memory={"clip_grad": 2.0, "clip": "joint"})
    assert clip_factors(joint, 3.0, {"memory": 4.0}) == (clip_factor(1.0, 5.0), {"memory": clip_factor(1.0, 5.0)})
    # A dense model has one norm whatever is set for a table.
    dense = toy_run(kind="dense", memory={"clip": "joint"})
    assert clip_factors(dense, 3.0, {}) == (clip_factor(1.0, 3.0), {})
