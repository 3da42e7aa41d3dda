"""Learning-rate schedules."""

import math

import pytest

from mempar.runtime.config import OptimConfig
from mempar.runtime.schedule import lr_factor


def curve(schedule: str, *, total: int = 100, **given: float) -> list[float]:
    optim = OptimConfig(lr=0.5, schedule=schedule, **given)
    return [lr_factor(optim, step, total) for step in range(total + 20)]


ALL_SCHEDULES = {"linear": {}, "cosine": {}, "wsd": {"wsd_decay_steps": 30}, "constant": {}}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_learning_rate_warms_up_then_only_falls(schedule: str, min_lr: float, warmup_steps: int) -> None:
    factors = curve(schedule, min_lr=min_lr, warmup_steps=warmup_steps, **ALL_SCHEDULES[schedule])
    assert factors[:warmup_steps] == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    falling = factors[warmup_steps:]
    assert falling[0] == 1.0
    assert falling == sorted(falling, reverse=True)
    end = 1.0 if schedule == "constant" else min_lr / 0.5
    assert falling[100 - warmup_steps :] == pytest.approx([end] * 20, abs=1e-12)
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_learning_rate_has_the_shape_of_its_schedule() -> None:
    given = {"min_lr": 0.05, "warmup_steps": 20}
    progress = [step / 80 for step in range(81)]
    linear, cosine = curve("linear", **given)[20:101], curve("cosine", **given)[20:101]
    assert linear == pytest.approx([0.1 + 0.9 * (1 - part) for part in progress])
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in progress])
    wsd = curve("wsd", wsd_decay_steps=30, **given)
    assert wsd[20:70] == [1.0] * 50
    assert wsd[70:100] == pytest.approx([1 - 0.9 * (step + 1) / 30 for step in range(30)])
    assert curve("constant", **given)[20:] == [1.0] * 100


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_learning_rate_ends_at_decay_steps_whatever_the_length_of_the_run(schedule: str) -> None:
    given = {"warmup_steps": 5, "decay_steps": 60, "min_lr": 0.05, **ALL_SCHEDULES[schedule]}
    short, long = curve(schedule, total=60, **given), curve(schedule, total=300, **given)
    assert long[:80] == short
    assert long[60:] == pytest.approx([1.0 if schedule == "constant" else 0.1] * 260)


def test_learning_rate_has_no_floor_when_lr_is_zero() -> None:
    assert lr_factor(OptimConfig(lr=0.0, schedule="linear"), 50, 100) == pytest.approx(0.5)
