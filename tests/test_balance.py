"""The balance loss against plain autograd, and what it does to a toy run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.memory.balance import BalanceMeter, balanced
from mempar.memory.config import MemoryConfig
from mempar.memory.layer import MemoryLayer
from mempar.memory.lookup import LocalReader, Readers
from mempar.memory.values import ValueShard
from rank_pool import RankPool
from toy import joined, toy_run, train


def dense_loss(weight: Tensor, slot_index: Tensor, num_subkeys: int) -> Tensor:
    """The definition, with tensors `[T, H, K, N]`."""
    halves = torch.stack((slot_index // num_subkeys, slot_index % num_subkeys))
    hot = torch.nn.functional.one_hot(halves, num_subkeys).to(weight.dtype)  # [2, T, H, K, N]
    share = hot.mean((1, 3))  # [2, H, N]
    mean_weight = (hot * weight[..., None]).sum(3).mean(1)
    return num_subkeys * (share * mean_weight).sum(-1).mean()


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 4), (64, 2, 8)])
def test_loss_and_gradient_equal_plain_autograd(shape: tuple[int, int, int]) -> None:
    num_subkeys, coefficient = 11, 0.03
    slot_index = torch.randint(num_subkeys**2, shape)
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    readout = torch.randn(shape, dtype=torch.float64)
    weight, loss = balanced(scores.softmax(-1), slot_index, num_subkeys, coefficient)
    assert torch.equal(weight, scores.softmax(-1))
    assert not loss.requires_grad
    (found,) = torch.autograd.grad((weight * readout).sum(), scores)
    plain = dense_loss(scores.softmax(-1), slot_index, num_subkeys)
    # The loss counts once a token.
    total = (scores.softmax(-1) * readout).sum() + coefficient * shape[0] * plain
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-12, atol=0.0)
    (expected,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_loss_is_one_when_even_and_n_when_one_sub_key_takes_all() -> None:
    num_subkeys = 6
    every = torch.arange(num_subkeys**2).view(-1, 1, 1)
    ones = torch.ones(num_subkeys**2, 1, 1, dtype=torch.float64)
    assert float(balanced(ones, every, num_subkeys, 1.0)[1]) == pytest.approx(1.0, rel=1e-12)
    assert float(balanced(ones, every * 0 + 8, num_subkeys, 1.0)[1]) == pytest.approx(num_subkeys, rel=1e-12)


def test_no_tokens_give_no_loss() -> None:
    weight, loss = balanced(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3, dtype=torch.int64), 5, 1.0)
    assert (tuple(weight.shape), float(loss)) == ((0, 2, 3), 0.0)


def test_meter_weighs_lookups_by_tokens_and_forgets() -> None:
    meter = BalanceMeter()
    meter.add(torch.tensor(2.0), 3)
    meter.add(torch.tensor(4.0), 1)
    assert meter.take(torch.zeros(2)).tolist() == [10.0, 4.0]
    assert meter.take(torch.zeros(2)).tolist() == [0.0, 0.0]


def make_readers() -> Readers:
    part = TableSlice(num_slots=25, value_dim=12, row_start=0, row_end=25, column_start=0, column_end=12)
    return Readers(
        values=LocalReader(ValueShard(part, seed=1, number=0, dtype=torch.float64, device=torch.device("cpu")))
    )


def make_layer(coefficient: float) -> MemoryLayer:
    torch.manual_seed(3)
    config = MemoryConfig(layers=(0,), num_subkeys=5, heads=2, top_k=3, key_dim=8, balance_loss=coefficient)
    layer = MemoryLayer(config, 12, 1e-5).double()
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return layer


def test_layer_adds_the_gradient_to_queries_and_keys() -> None:
    plain, layer = make_layer(0.0), make_layer(0.5)
    x = torch.randn(9, 12, dtype=torch.float64)
    for each in (plain, layer):
        each(x, make_readers()).sum().backward()
    slot_index, weight = plain.choose(x)
    extra = 0.5 * len(x) * dense_loss(weight, slot_index, 5)
    for name in ("keys", "query.weight"):
        found = layer.get_parameter(name).grad - plain.get_parameter(name).grad
        (expected,) = torch.autograd.grad(extra, plain.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    totals = layer.balance.take(torch.zeros(2))
    torch.testing.assert_close(totals, torch.stack((extra.detach() / 0.5, torch.tensor(9.0, dtype=torch.float64))))
    assert plain.balance.totals is None
    with torch.no_grad():
        layer(x, make_readers())
    assert layer.balance.totals is None


def coverage(pool: RankPool, coefficient: float, world_size: int, **layout: Any) -> tuple[int, list[float]]:
    """Distinct (block, slot) pairs read in the last step of a run, and its balance losses."""
    run = toy_run(micro_batches=2, **layout)
    memory = replace(run.memory, num_subkeys=24, top_k=2, balance_loss=coefficient)
    run = replace(run, memory=memory, optim=replace(run.optim, lr=1e-2, schedule="constant"))
    history = joined(run, pool.run(world_size, train, run, STEPS, None, ("slots",)))
    read = {
        (block, slot)
        for (step, block, _), slots in history.trace.slots.items()
        if step == STEPS - 1
        for slot in slots.flat
    }
    return len(read), [report.balance_losses["memory"] for report in history.reports]


STEPS = 30


def test_balance_loss_spreads_the_reads_of_a_toy_run(pool: RankPool) -> None:
    without, silent = coverage(pool, 0.0, 1)
    spread, losses = coverage(pool, 0.3, 2, tp=2, mp=2)
    assert silent == [0.0] * STEPS
    assert losses[0] > 1.0
    assert losses[-1] < losses[0]
    assert spread > 1.1 * without
