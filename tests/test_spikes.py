"""When a step counts as a spike and when it began (mempar.runtime.spikes, mempar.runtime.progress); settings."""

import json
import math

import pytest

from mempar.errors import ConfigError
from mempar.runtime.config import TrainConfig
from mempar.runtime.optim import StepReport
from mempar.runtime.progress import Progress
from mempar.runtime.spikes import Spike, find_spike

SETTINGS = TrainConfig(spike_factor=2.0, spike_window=5, spike_skips=3)


def judge(losses: list[float], settings: TrainConfig = SETTINGS) -> list[Spike]:
    """Spikes among steps with these losses; NaN is a skipped step."""
    progress, found = Progress(), []
    for loss in losses:
        applied = math.isfinite(loss)
        report = StepReport(
            loss=loss, grad_norm=1.0, memory_grad_norms={}, tokens=7, applied=applied, balance_losses={}
        )
        spike = find_spike(settings, progress, report)
        found += [spike] if spike is not None else []
        progress.advance(applied=applied, loss=loss, tokens=7, samples=12, window=settings.spike_window)
    assert (progress.step, progress.tokens, progress.samples) == (len(losses), 7 * len(losses), 12 * len(losses))
    assert progress.skipped == sum(map(math.isnan, losses))
    return found


def test_spike_is_a_loss_beyond_factor_times_the_median_of_a_full_window() -> None:
    assert judge([2.0, 2.2, 1.8, 2.0, 9.0]) == []
    assert judge([2.0, 2.2, 1.8, 2.0, 2.1, 4.0]) == []
    (spike,) = judge([2.0, 2.2, 1.8, 2.0, 2.1, 4.1, 2.0])
    assert (spike.step, spike.began, spike.loss, spike.median, spike.skips) == (6, 6, 4.1, 2.0, 0)
    assert "4.1 of step 6 is 2.05 times" in str(spike)
    assert judge([2.0] * 6 + [9.0], TrainConfig(spike_window=5)) == []


def test_median_follows_the_last_losses_and_skips_do_not_enter_it() -> None:
    # A level that lasts becomes the typical one.
    assert [spike.step for spike in judge([1.0] * 5 + [3.0] * 6)] == [6, 7, 8]
    assert judge([1.0, 1.0, math.nan, 1.0, 1.0, math.nan, 9.0]) == []
    (spike,) = judge([1.0, 1.0, math.nan, 1.0, 1.0, math.nan, 1.0, 9.0])
    assert (spike.step, spike.median) == (8, 1.0)


def test_spike_began_with_the_first_elevated_loss_before_it() -> None:
    # Nearer to the threshold 2.0 than to the median 1.0: above 1.5.
    assert judge([1.0] * 5 + [1.6, 1.7, 2.5])[0].began == 6
    assert judge([1.0] * 5 + [1.4, 1.6, 2.5])[0].began == 7
    assert judge([1.0] * 5 + [1.6, 1.2, 2.5])[0].began == 8
    # Skipped steps between elevated ones belong to the spike.
    assert judge([1.0] * 5 + [1.6, math.nan, 2.5])[0].began == 6
    assert judge([1.0] * 5 + [math.nan, 2.5])[0].began == 6


def test_skipped_steps_are_judged_where_losses_are_not() -> None:
    (spike,) = judge([1.0, math.nan, math.nan, math.nan, 9.0], TrainConfig(spike_window=2, spike_skips=3))
    assert (spike.step, spike.began, spike.skips) == (4, 2, 3)


def test_skipped_steps_in_a_row_are_a_spike_once() -> None:
    (spike,) = judge([1.0, 1.0] + [math.nan] * 5 + [1.0])
    assert (spike.step, spike.began, spike.median, spike.skips) == (5, 3, None, 3)
    assert "step 5 is the last of 3 skipped steps" in str(spike)
    assert judge([1.0, math.nan, math.nan, 1.0, math.nan, math.nan]) == []
    assert judge([1.0] * 5 + [1.7] + [math.nan] * 3)[0].began == 6


def test_progress_survives_json() -> None:
    progress = Progress(step=4, applied_steps=3, tokens=9, samples=77, rollbacks=1)
    progress.advance(applied=True, loss=0.1 + 0.2, tokens=1, samples=1, window=3)
    restored = Progress()
    restored.restore(json.loads(json.dumps({**progress.meta(), "world": 4})))
    assert restored == progress
    assert (restored.losses, restored.skipped, restored.samples) == ([(5, 0.1 + 0.2)], 1, 78)
    progress.advance(applied=True, loss=1.0, tokens=1, samples=1, window=0)
    assert progress.losses == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spike_factor": 0.9}, r"spike_factor=0\.9 would call"),
        ({"spike_factor": -1.0}, r"spike_factor=-1\.0 "),
        ({"spike_factor": 2.0, "spike_window": 0}, r"spike_window=0 "),
        ({"spike_factor": 2.0, "spike_action": "retreat"}, r"spike_action=retreat .*report, rollback"),
        ({"spike_action": "rollback", "save_interval": 5}, r"spike_action=rollback with train\.spike_factor=0\.0"),
        ({"spike_action": "rollback", "spike_factor": 2.0}, r"train\.save_interval=0"),
        (
            {"spike_action": "rollback", "spike_factor": 2.0, "save_interval": 2, "spike_skips": 4},
            r"spike_skips=4 steps may outlast .*use at most 3",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
