"""bf16 tables and moments: master, stochastic and nearest rounding."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mempar.kernels.hashing import hashed_bits
from mempar.kernels.row_update.rounding import Rounder
from mempar.memory.optimizer import OptimizerSettings, TableAdam, make_table_optimizer
from rank_pool import RankPool
from shards import slice_of, touched_rows, whole_part
from toy import TABLE, joined, toy_run, train

pytestmark = pytest.mark.usefixtures("fresh_seed", "one_thread")
SETTINGS = OptimizerSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
PLAIN = replace(SETTINGS, eps=1e-12, weight_decay=0.0)


def round_rows(wide: Tensor, *, seed: int = 5, step: int = 1, stream: str = "values") -> Tensor:
    rounder = Rounder(whole_part(wide), seed)
    return rounder.stochastic(wide, torch.arange(len(wide)), step, stream)


@pytest.mark.parametrize("touched_only", [False, True])
def test_bf16_values_do_not_stall_when_updates_are_below_their_resolution(touched_only: bool) -> None:
    lr, num_steps = 2e-5, 40
    values = torch.full((6, 4), 0.03, dtype=torch.bfloat16)
    start = values.clone()
    # Plain bf16 stalls: a step of lr is less than half of the distance to the next number.
    assert torch.equal(start - lr, start)
    optimizer = TableAdam(values, whole_part(values), PLAIN, touched_only=touched_only)
    rows = torch.tensor([1, 4], dtype=torch.int32)
    for _ in range(num_steps):
        optimizer.update(rows, torch.ones(2, 4), lr)
    assert optimizer.state["master"].dtype == optimizer.state["exp_avg"].dtype == torch.float32
    # Adam's step is lr where the gradient never changes.
    expected = start[[1, 4]].double() - lr * num_steps
    torch.testing.assert_close(optimizer.state["master"][[1, 4]].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(values, optimizer.state["master"].bfloat16())
    assert (values[[1, 4]] < start[[1, 4]]).all()
    assert torch.equal(values[[0, 2, 3, 5]], start[[0, 2, 3, 5]])


@pytest.mark.parametrize("name", ["adamw", "row_adam", "row_adagrad"])
def test_bf16_table_follows_its_float32_master(name: str) -> None:
    values = torch.randn(9, 5).bfloat16()
    wide = values.float()
    optimizers = [make_table_optimizer(name, table, whole_part(table), SETTINGS) for table in (values, wide)]
    for num_touched in (3, 0, 9, 5):
        rows, grad = touched_rows(9, num_touched), torch.randn(num_touched, 5)
        for optimizer in optimizers:
            optimizer.update(rows, grad.clone(), 0.01)
    assert torch.equal(optimizers[0].state["master"], wide)
    assert torch.equal(values, wide.bfloat16())


@pytest.mark.parametrize("name", ["adamw", "row_adam", "row_adagrad"])
def test_stochastic_rounding_follows_float32_where_nearest_stalls(name: str) -> None:
    # Values regress to targets that are 0.004 away, by steps of a tenth of what bf16 resolves near 0.1.
    shape, lr, num_steps = (40, 64), 2e-5, 200
    start = (0.1 + 0.01 * torch.rand(shape)).bfloat16()
    distance: dict[str, float] = {}
    tables = {"float32": start.float(), "stochastic": start.clone(), "nearest": start.clone()}
    for rounding, values in tables.items():
        settings = replace(PLAIN, rounding="master" if rounding == "float32" else rounding, column_tile=16)
        optimizer = make_table_optimizer(name, values, whole_part(values), settings)
        rows = torch.arange(len(values), dtype=torch.int32)
        for step in range(num_steps):
            # Adagrad's steps fade with the root of the step number: this rate keeps them constant.
            rate = lr * math.sqrt(1 + step) if name == "row_adagrad" else lr
            optimizer.update(rows, torch.ones(shape), rate)
        assert "master" not in optimizer.state
        distance[rounding] = float((start.double() - values.double()).mean())
    assert distance["float32"] == pytest.approx(lr * num_steps, rel=1e-3)
    assert distance["nearest"] == 0.0
    # Each element walks: a step goes one bf16 number (4.9e-4) down with probability p = 2e-5 / 4.9e-4, so that 200
    # steps deviate by 4.9e-4 sqrt(200 p (1 - p)) = 1.4e-3, and the mean of 2560 elements by 2.8e-5: six of these.
    assert distance["stochastic"] == pytest.approx(distance["float32"], abs=1.7e-4)


def test_stochastic_rounding_is_right_on_average_and_takes_a_neighbour() -> None:
    wide = torch.cat([torch.randn(2000, 50), 1e-30 * torch.randn(1, 50), torch.full((1, 50), 3e38)])
    wide[0, :4] = torch.tensor([0.0, -0.0, 1.5, -2.0])
    rounded = round_rows(wide)
    below = (wide.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((wide.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((rounded.float() == below) | (rounded.float() == above)).all()
    # A number that bf16 holds stays.
    assert torch.equal(rounded[0, :4].float(), wide[0, :4])
    # As shares of a step: uniform errors of mean 0, six deviations of the mean of 10^5 of them.
    error = ((rounded.double() - wide.double()) / (above.double() - below.double()).abs())[1:2000]
    assert abs(error.mean()) < 6 * 0.41 / math.sqrt(error.numel())
    kept = torch.tensor([[math.inf, -math.inf, math.nan, -math.nan]])
    assert torch.equal(round_rows(kept).float().nan_to_num(7.0), kept.nan_to_num(7.0))


def test_stochastic_rounding_differs_by_seed_step_stream_slot_and_column() -> None:
    wide = torch.full((64, 64), 1.0 + 2**-8)
    first = round_rows(wide)
    assert torch.equal(first, round_rows(wide))
    for other in ({"seed": 6}, {"step": 2}, {"stream": "exp_avg"}, {"stream": "exp_avg_sq"}):
        # Half of the elements go up: two draws agree on half of them, give or take six deviations.
        agreement = (first == round_rows(wide, **other)).double().mean()
        assert abs(agreement - 0.5) < 6 * 0.5 / 64
    for shifted in (first[1:] == first[:-1], first[:, 1:] == first[:, :-1], first[:, 4:] == first[:, :-4]):
        assert abs(shifted.double().mean() - 0.5) < 6 * 0.5 / 60


def test_stochastic_rounding_of_a_slice_is_the_slice_of_the_rounded_table() -> None:
    wide = torch.randn(20, 23)
    whole = round_rows(wide)
    for rows in ((0, 20), (7, 13)):
        for columns in ((0, 23), (5, 11), (4, 8), (22, 23)):
            part = slice_of(20, 23, rows, columns)
            rounded = Rounder(part, 5).stochastic(
                wide[slice(*rows), slice(*columns)], slice(0, part.num_rows), 1, "values"
            )
            assert torch.equal(rounded, whole[slice(*rows), slice(*columns)])


def test_hashed_bits_are_balanced() -> None:
    bits = hashed_bits((3, 1, 0), torch.arange(300), torch.arange(100))
    for place in range(64):
        share = (bits >> place & 1).double().mean()
        assert abs(share - 0.5) < 6 * 0.5 / math.sqrt(bits.numel()), place


def test_bf16_second_moment_fades_under_stochastic_rounding_and_not_under_nearest() -> None:
    # Why moments are rounded stochastically: at beta2 = .999 a moment shrinks by less than half a bf16 step.
    num_steps, shape = 1000, (40, 32)
    values, zero = torch.zeros(shape), torch.zeros(shape)
    optimizer = TableAdam(values, whole_part(values), replace(PLAIN, beta2=0.999, moments="bf16"), touched_only=True)
    moment = optimizer.state["exp_avg_sq"]
    assert moment.dtype == optimizer.state["exp_avg"].dtype == torch.bfloat16
    moment.fill_(0.7)
    nearest = moment.clone()
    rows = torch.arange(len(values), dtype=torch.int32)
    for _ in range(num_steps):
        optimizer.update(rows, zero, 1e-3)
        nearest = (0.999 * nearest.float()).bfloat16()
    assert torch.equal(nearest, torch.full(shape, 0.7, dtype=torch.bfloat16))
    assert moment.double().mean() == pytest.approx(0.7 * 0.999**num_steps, rel=0.02)


def test_toy_run_with_bf16_table_follows_float32_by_stochastic_rounding_and_not_by_nearest(pool: RankPool) -> None:
    # Values are near 24^-1/2 = .2, where bf16 resolves 1e-3: most steps of 1e-4 are lost to the nearest.
    steps, settings = 40, {"lr": 1e-4, "weight_decay": 0.0}
    wide = toy_run(memory=settings)
    start = pool.submit(1, train, wide, 0, None, ("parameters",))
    truth = joined(wide, pool.run(1, train, wide, steps, None, ("parameters", "slots")))
    initial = joined(wide, start.result()).parameters[TABLE]
    moved = truth.parameters[TABLE] - initial
    along, loss = {}, {}
    for rounding in ("stochastic", "nearest"):
        run = toy_run(memory={**settings, "dtype": "bf16", "rounding": rounding})
        # The same slots are read, so that what differs is the rounding.
        history = joined(run, pool.run(1, train, run, steps, truth.trace, ("parameters",)))
        change = history.parameters[TABLE] - torch.from_numpy(initial).bfloat16().float().numpy()
        along[rounding] = float((change * moved).sum() / (moved**2).sum())
        loss[rounding] = history.reports[-1].loss
    # How far the table went along the way of the float32 table.
    assert along["stochastic"] == pytest.approx(1.0, abs=0.1)
    assert along["nearest"] < 0.5
    assert loss["stochastic"] == pytest.approx(truth.reports[-1].loss, rel=1e-3)
