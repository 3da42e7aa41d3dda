"""Optimizers of a table shard: against torch, against the oracle, and shards against the whole table."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oracle
from mempar.dims import even_cuts
from mempar.kernels.row_update import native
from mempar.memory.config import OPTIMIZERS
from mempar.memory.optimizer import OptimizerSettings, TableAdam, TableOptimizer, make_table_optimizer
from shards import assert_same, slice_of, touched_rows, whole_part

pytestmark = pytest.mark.usefixtures("fresh_seed", "one_thread")
TILE = 4
SETTINGS = OptimizerSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, column_tile=TILE)


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 100])
def test_table_adamw_matches_torch_on_the_dense_gradient(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    num_rows, width = 10, 7
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", rows_at_once * width + width // 2)
    values = torch.randn(num_rows, width, dtype=torch.float64)
    param = torch.nn.Parameter(values.clone())
    truth = torch.optim.AdamW([param], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = TableAdam(values, whole_part(values), SETTINGS, touched_only=False)
    for step, num_touched in enumerate((4, 0, 10, 1, 7, 3)):
        rows, lr = touched_rows(num_rows, num_touched), 0.05 / (1 + step)
        grad = torch.randn(num_touched, width, dtype=torch.float64)
        param.grad = torch.zeros_like(param).index_copy(0, rows.long(), grad)
        truth.param_groups[0]["lr"] = lr
        truth.step()
        optimizer.update(rows, grad, lr)
        assert_same(values, param.detach(), 1e-13)
    assert optimizer.step == 6
    state = truth.state[param]
    assert_same(optimizer.state["exp_avg"], state["exp_avg"], 1e-13)
    assert_same(optimizer.state["exp_avg_sq"], state["exp_avg_sq"], 1e-13)
    assert "master" not in optimizer.state


def oracle_state(state: oracle.OptimState) -> dict[str, Tensor]:
    named = {"exp_avg": state.first, "exp_avg_sq": state.second, "accumulator": state.accumulator}
    return {name: params[oracle.VALUES] for name, params in named.items() if params}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_table_optimizer_matches_oracle(monkeypatch: pytest.MonkeyPatch, rows_at_once: int, name: str) -> None:
    num_rows, width = 11, 10
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", rows_at_once * width)
    values = torch.randn(num_rows, width, dtype=torch.float64)
    params, state = {oracle.VALUES: values.clone()}, oracle.OptimState()
    optimizer = make_table_optimizer(name, values, whole_part(values), SETTINGS)
    for step, num_touched in enumerate((4, 0, 11, 1, 7, 4)):
        rows, lr = touched_rows(num_rows, num_touched), 0.05 / (1 + step)
        grad = torch.randn(num_touched, width, dtype=torch.float64)
        # A row that was chosen is touched, whatever its gradient.
        grad[::3] = 0.0
        dense = torch.zeros_like(values).index_copy(0, rows.long(), grad)
        optim = oracle.OptimConfig(lr=0.0, memory_lr=lr, memory_clip_grad=0.0, column_tile=TILE)
        before = {key: tensor.clone() for key, tensor in {"values": values, **optimizer.state}.items()}
        slots = [{0: rows.long().repeat(2)}] if num_touched else [{0: torch.zeros(0, dtype=torch.int64)}]
        oracle.update(params, {oracle.VALUES: dense}, slots, state, optim, name)
        optimizer.update(rows, grad, lr)
        assert_same(values, params[oracle.VALUES], 1e-13)
        expected = oracle_state(state)
        assert expected.keys() == optimizer.state.keys()
        for key, tensor in expected.items():
            assert_same(optimizer.state[key], tensor, 1e-13)
        if name != "adamw":
            others = torch.ones(num_rows, dtype=torch.bool)
            others[rows.long()] = False
            for key, tensor in {"values": values, **optimizer.state}.items():
                assert torch.equal(tensor[others], before[key][others])


def test_row_adagrad_keeps_one_statistic_a_tile() -> None:
    values = torch.randn(6, 10)
    optimizer = make_table_optimizer("row_adagrad", values, whole_part(values), SETTINGS)
    grad = torch.randn(2, 10)
    optimizer.update(torch.tensor([1, 4], dtype=torch.int32), grad, 0.1)
    accumulator = optimizer.state["accumulator"]
    assert accumulator.shape == (6, 3) and accumulator.dtype == torch.float32
    # The last tile has two columns.
    means = torch.stack([grad[:, columns].square().mean(1) for columns in (slice(0, 4), slice(4, 8), slice(8, 10))], 1)
    torch.testing.assert_close(accumulator[[1, 4]], means)
    assert not accumulator[[0, 2, 3, 5]].any()


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("row_adam", {}, torch.float32),
        ("row_adam", {"moments": "bf16"}, torch.float32),
        ("row_adam", {"moments": "bf16", "rounding": "stochastic"}, torch.bfloat16),
        ("row_adagrad", {}, torch.float64),
        ("row_adagrad", {"rounding": "stochastic"}, torch.bfloat16),
        ("row_adagrad", {}, torch.bfloat16),
        ("adamw", {"rounding": "stochastic"}, torch.bfloat16),
    ],
    ids=str,
)
def test_shards_compute_bit_for_bit_what_the_whole_table_does(name: str, settings: dict, dtype: torch.dtype) -> None:
    num_rows, width = 13, 22
    whole = torch.randn(num_rows, width).to(dtype)
    row_cuts, column_cuts = even_cuts(num_rows, 3), [0, 8, 12, 22]
    chosen = replace(SETTINGS, seed=77, **settings)
    shards: list[tuple[tuple[slice, slice], TableOptimizer]] = []
    for rows in itertools.pairwise(row_cuts):
        for columns in itertools.pairwise(column_cuts):
            cut = slice(*rows), slice(*columns)
            part = slice_of(num_rows, width, rows, columns)
            shards.append((cut, make_table_optimizer(name, whole[cut].clone(), part, chosen)))
    single = make_table_optimizer(name, whole, slice_of(num_rows, width, (0, num_rows), (0, width)), chosen)
    for num_touched in (6, 13, 0, 3):
        rows, grad = touched_rows(num_rows, num_touched), torch.randn(num_touched, width).to(single.wide)
        single.update(rows, grad, 0.01)
        for (own_rows, own_columns), shard in shards:
            mine = (rows >= own_rows.start) & (rows < own_rows.stop)
            shard.update(rows[mine] - own_rows.start, grad[mine][:, own_columns].contiguous(), 0.01)
    for cut, shard in shards:
        assert torch.equal(shard.values, whole[cut])
        assert shard.state.keys() == single.state.keys()
        for key, tensor in shard.state.items():
            place = shard.place_of(key)
            block = single.state[key][place.row_start : place.row_end, place.column_start : place.column_end]
            assert tensor.dtype == block.dtype and torch.equal(tensor, block), key
