"""Small parts of a step: clipping, and the cursor that remembers the micro-batch being computed."""

import math

import pytest
import torch

from mempar.runtime.config import OptimConfig
from mempar.runtime.data import Batch
from mempar.runtime.optim import clip_factor, clip_factors
from mempar.runtime.step import BatchCursor
from toy import toy_run


def test_clip_factor_scales_to_the_limit_and_never_up() -> None:
    assert clip_factor(1.0, 0.5) == 1.0
    assert clip_factor(1.0, 4.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.0, 1e9) == 1.0
    assert math.isfinite(clip_factor(1.0, 0.0))


def test_clip_limits_both_norms_or_the_joint_one() -> None:
    own = toy_run(memory={"clip_grad": 2.0})
    assert own.optim == OptimConfig(lr=3e-4) and own.optim.clip_grad == 1.0
    assert clip_factors(own, 3.0, 4.0) == (clip_factor(1.0, 3.0), clip_factor(2.0, 4.0))
    joint = toy_run(memory={"clip_grad": 2.0, "clip": "joint"})
    assert clip_factors(joint, 3.0, 4.0) == (clip_factor(1.0, 5.0), clip_factor(1.0, 5.0))
    # A dense model has one norm whatever is set for a table.
    dense = toy_run(kind="dense", memory={"clip": "joint"})
    assert clip_factors(dense, 3.0, 0.0)[0] == clip_factor(1.0, 3.0)


def test_cursor_remembers_the_batch_in_hand() -> None:
    empty = torch.zeros(1, 1)
    batches = [Batch(tokens=empty, labels=empty, loss_mask=empty, position_ids=empty, sample_ids=[i]) for i in range(2)]
    cursor = BatchCursor(batches)
    assert cursor.current is None
    assert [next(cursor) is batch and cursor.current is batch for batch in batches] == [True, True]
    with pytest.raises(StopIteration):
        next(cursor)
