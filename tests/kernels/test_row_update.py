"""Rules applied to touched rows, against their reference; their rounding, shards and fused forms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from bags import assert_near
from mempar.dims import TableSlice
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.reduce_rows import reference as reduce_reference
from mempar.kernels.reduce_rows.segments import PIECE_ENTRIES
from mempar.kernels.row_update import (
    Adagrad,
    Rule,
    TableRows,
    backward_and_update,
    reduce_and_update,
    update_rows,
)
from mempar.kernels.weighted_gather import reference as gather_reference
from mempar.memory.optimizer import OptimizerSettings, make_table_optimizer
from mempar.memory.values import ValueShard
from row_tables import (
    BF16,
    SCALE,
    STEP,
    assert_updated,
    copy_of,
    expected_update,
    make_table,
    part_of,
    state_of,
    tensors_of,
)

FLOAT32, FLOAT64 = torch.float32, torch.float64
# dtype of values, how they are rounded, dtype of moments.
KINDS: dict[str, tuple[torch.dtype, str, torch.dtype | None]] = {
    "float32": (FLOAT32, "master", None),
    "float32-bf16-moments": (FLOAT32, "master", BF16),
    "float64": (FLOAT64, "master", None),
    "bf16-master": (BF16, "master", None),
    "bf16-stochastic": (BF16, "stochastic", BF16),
    "bf16-nearest": (BF16, "nearest", None),
}
every_rule = pytest.mark.parametrize("name", ["adagrad", "adam"])
every_kind = pytest.mark.parametrize("kind", KINDS)
# Rows of a shard, its columns, a tile of them.
SHAPES = [(1, 1, 8), (6, 7, 4), (5, 33, 8), (4, 100, 12), (3, 300, 128), (2, 24, 8)]


def make(name: str, kind: str, part: TableSlice, **options: Any) -> tuple[TableRows, Rule]:
    dtype, rounding, moments = KINDS[kind]
    return make_table(name, part, dtype, rounding=rounding, moments=moments, **options)


def bits(tensor: Tensor) -> Tensor:
    """Numbers that are equal only where all bits are."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(bits(tensor), bits(expected[key])), key


def touched(num_rows: int, num_touched: int) -> Tensor:
    return torch.randperm(num_rows)[:num_touched].sort()[0].int()


def spoil_others(tensors: dict[str, Tensor], rows: Tensor) -> None:
    """Nobody may look at the rows that are not touched."""
    others = torch.ones(len(tensors["values"]), dtype=torch.bool)
    others[rows.long()] = False
    for tensor in tensors.values():
        tensor[others] = torch.nan


@every_rule
@every_kind
def test_update_matches_reference(name: str, kind: str, backend: Backend) -> None:
    for num_rows, width, tile in SHAPES:
        table, rule = make(name, kind, part_of(num_rows, width), column_tile=tile)
        rows = touched(num_rows, (num_rows + 1) // 2)
        tensors = tensors_of(table, rule)
        spoil_others(tensors, rows)
        around = table.values.as_strided((num_rows, 2), (table.values.stride(0), 1), 0)
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        grad = torch.randn(len(rows), width).to(table.wide)
        expected = expected_update(table, rule, rows, grad)
        update_rows(table, rule, rows, grad, step=STEP, scale=SCALE, backend=backend)
        assert_updated(before, tensors, rows, expected, KINDS[kind][1])
        assert around.isnan().all()


@examples(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["adagrad", "adam"]),
    kind=st.sampled_from(sorted(KINDS)),
    num_rows=st.integers(1, 6),
    num_touched=st.integers(0, 6),
    width=st.integers(1, 40),
    tile=st.integers(1, 20),
)
def test_update_matches_reference_at_any_size(
    backend: Backend, name: str, kind: str, num_rows: int, num_touched: int, width: int, tile: int
) -> None:
    table, rule = make(name, kind, part_of(num_rows, width), column_tile=tile)
    rows = touched(num_rows, num_touched).long()
    tensors = tensors_of(table, rule)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    grad = torch.randn(len(rows), width)
    expected = expected_update(table, rule, rows, grad)
    update_rows(table, rule, rows, grad, step=STEP, scale=SCALE, backend=backend)
    assert_updated(before, tensors, rows, expected, KINDS[kind][1])


@pytest.mark.parametrize("column_start", [0, 24, 6])
@pytest.mark.parametrize("row_start", [0, 5, 3 * 10**9])
@pytest.mark.parametrize("seed", [0, (7 << 32) + 1])
def test_random_bits_are_those_of_torch(column_start: int, row_start: int, seed: int, backend: Backend) -> None:
    # Operations whose float32 results are exact or rounded once: what differs could only be the bits.
    tile, width = (6, 33) if column_start == 6 else (8, 33)
    part = part_of(4, width, row_start, column_start)
    rows = torch.tensor([0, 2, 3], dtype=torch.int32)
    table, adagrad = make_table("adagrad", part, BF16, rounding="stochastic", column_tile=tile, seed=seed)
    adam = make_table("adam", part, BF16, moments=BF16)[1]
    adam.exp_avg.zero_()
    adam.exp_avg_sq.zero_()
    # Values only decay; moments become the gradient and its square.
    for rule, grad in ((adagrad, torch.zeros(3, width)), (replace(adam, beta1=0.0, beta2=0.0), torch.randn(3, width))):
        tables = [copy_of(table, rule) for _ in range(2)]
        for (each, its_rule), its_backend in zip(tables, (backend, TORCH), strict=True):
            update_rows(each, its_rule, rows, grad, step=1234567, backend=its_backend)
        found, expected = (tensors_of(*each) for each in tables)
        if rule is not adagrad:
            # Moved by a quotient, which is rounded more than once.
            del found["values"], expected["values"]
        assert_identical(found, expected)


def test_stochastic_rounding_keeps_what_bf16_cannot_round(backend: Backend) -> None:
    part = part_of(1, 8)
    table, rule = make_table("adagrad", part, BF16, rounding="stochastic")
    kept = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.5, -2.0, 2.0**-100])
    table.values[0] = kept
    rule = replace(rule, weight_decay=0.0)
    update_rows(table, rule, torch.tensor([0]), torch.zeros(1, 8), step=1, backend=backend)
    torch.testing.assert_close(table.values[0].float(), kept.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@every_rule
@every_kind
def test_column_and_row_shards_compute_bit_for_bit_what_the_whole_table_does(
    name: str, kind: str, backend: Backend
) -> None:
    # Shards of widths that 16 divides, as real ones are: others may be cut differently over a GPU's threads.
    num_rows, width, tile = 7, 176, 16
    whole, rule = make(name, kind, part_of(num_rows, width), column_tile=tile)
    rows, grad = touched(num_rows, 5), torch.randn(5, width)
    shards = []
    for first_row, last_row in ((0, 3), (3, 7)):
        for first, last in ((0, 64), (64, 96), (96, 176)):
            cut, tile_cut = slice(first, last), slice(first // tile, -(-last // tile))
            own = slice(first_row, last_row)
            part = replace(whole.part, row_start=first_row, row_end=last_row, column_start=first, column_end=last)
            master = None if whole.master is None else whole.master[own, cut].clone()
            table = replace(whole, values=whole.values[own, cut].clone(), master=master, part=part)
            state = {
                key: tensor[own, tile_cut if key == "accumulator" else cut].clone()
                for key, tensor in state_of(whole, rule).items()
            }
            shards.append((own, cut, tile_cut, table, replace(rule, **state)))
    update_rows(whole, rule, rows, grad, step=STEP, backend=backend)
    for own, cut, tile_cut, table, its_rule in shards:
        mine = (rows >= own.start) & (rows < own.stop)
        update_rows(table, its_rule, rows[mine] - own.start, grad[mine][:, cut], step=STEP, backend=backend)
        expected = {
            key: tensor[own, tile_cut if key == "accumulator" else cut]
            for key, tensor in tensors_of(whole, rule).items()
        }
        assert_identical(tensors_of(table, its_rule), expected)


def entries_of(case: str, num_rows: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """row_index [E] int32, weight [E], bag_index [E] int32, and the number of bags."""
    rows = {
        "few": torch.randint(num_rows, (9,)),
        "duplicates": torch.randint(2, (20,)) + num_rows - 2,
        "one": torch.tensor([0]),
        "none": torch.tensor([], dtype=torch.int64),
        # A row of two pieces between short ones.
        "hot": torch.cat([torch.full((PIECE_ENTRIES + 20,), 1), torch.tensor([0, 2, 2])]),
    }[case]
    rows, num_bags = rows[torch.randperm(len(rows))].int(), 6
    return rows, torch.randn(len(rows)), torch.randint(num_bags, (len(rows),), dtype=torch.int32), num_bags


ENTRIES = pytest.mark.parametrize("case", ["few", "duplicates", "one", "none", "hot"])


@every_rule
@pytest.mark.parametrize("kind", ["float32", "float64", "bf16-stochastic", "bf16-master"])
@ENTRIES
@pytest.mark.parametrize("fused_backward", [False, True])
def test_reduced_deposits_are_applied(name: str, kind: str, case: str, fused_backward: bool, backend: Backend) -> None:
    num_rows, width, tile = 5, 33, 8
    table, rule = make(name, kind, part_of(num_rows, width), column_tile=tile)
    row_index, weight, bag_index, num_bags = entries_of(case, num_rows)
    grad = torch.randn(num_bags, width).to(table.values.dtype)
    weight = weight.to(table.values.dtype)
    tensors = tensors_of(table, rule)
    spoil_others(tensors, row_index)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    wide = weight.double(), bag_index, grad.double()
    rows, sums = reduce_reference.reduce_rows(row_index, *wide)
    # Sums of a thousand terms of either sign are near in absolute terms only, and Adagrad divides by them.
    rule = replace(rule, eps=1e-3)
    expected = expected_update(table, rule, rows, sums)
    scores = gather_reference.gather_scores(table.values.double(), row_index, bag_index, grad.double())
    magnitude = gather_reference.gather_scores(table.values.double().abs(), row_index, bag_index, grad.double().abs())
    entries = row_index, weight, bag_index
    if fused_backward:
        found = backward_and_update(table, rule, *entries, grad, step=STEP, scale=SCALE, backend=backend)
        assert_near(found, scores, magnitude, table.values.dtype, width)
    else:
        parts = [grad[:2], grad[2:2], grad[2:].to(table.wide)]
        found = reduce_and_update(table, rule, *entries, parts, step=STEP, scale=SCALE, backend=backend)
        assert found.tolist() == rows.tolist()
    assert_updated(before, tensors, rows, expected, KINDS[kind][1], num_terms=len(row_index))


@every_rule
def test_fused_updates_do_not_vary_from_run_to_run(name: str, backend: Backend) -> None:
    table, rule = make(name, "bf16-stochastic", part_of(5, 40), column_tile=8)
    row_index, weight, bag_index, num_bags = entries_of("hot", 5)
    grad = torch.randn(num_bags, 40).to(BF16)
    runs = [copy_of(table, rule) for _ in range(2)]
    scores = [
        backward_and_update(*each, row_index, weight.to(BF16), bag_index, grad, step=STEP, backend=backend)
        for each in runs
    ]
    assert torch.equal(*scores)
    assert_identical(tensors_of(*runs[0]), tensors_of(*runs[1]))


def test_update_refuses_state_that_does_not_fit(backend: Backend) -> None:
    rows, grad = torch.tensor([1]), torch.zeros(1, 20)
    table, rule = make_table("adagrad", part_of(3, 20), FLOAT32)
    with pytest.raises(ValueError, match=r"accumulator is \[3, 2\]"):
        short = Adagrad(accumulator=torch.zeros(3, 2), column_tile=8, lr=0.1, eps=1e-8, weight_decay=0.0)
        update_rows(table, short, rows, grad, step=1, backend=backend)
    with pytest.raises(ValueError, match=r"grad is \[1, 19\]"):
        update_rows(table, rule, rows, grad[:, :19], step=1, backend=backend)
    _, adam = make_table("adam", part_of(3, 20), FLOAT64, moments=BF16)
    with pytest.raises(ValueError, match="exp_avg is"):
        update_rows(make_table("adam", part_of(3, 20), FLOAT64)[0], adam, rows, grad, step=1, backend=backend)


def test_update_looks_for_rows_out_of_range(checking: Backend) -> None:
    table, rule = make_table("adagrad", part_of(3, 20), FLOAT32)
    with pytest.raises(IndexError, match="rows holds ids from 1 to 3"):
        update_rows(table, rule, torch.tensor([1, 3]), torch.zeros(2, 20), step=1, backend=checking)


@every_rule
def test_optimizer_of_a_shard_computes_with_its_backend(name: str, backend: Backend) -> None:
    settings = OptimizerSettings(
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, column_tile=8, rounding="stochastic", moments="bf16"
    )
    rows, grad = touched(6, 4), torch.randn(4, 20)
    start, states = torch.randn(6, 20), []
    for each in (TORCH, backend):
        values = start.clone()
        optimizer = make_table_optimizer(f"row_{name}", values, part_of(6, 20), replace(settings, backend=each))
        for _ in range(3):
            optimizer.update(rows, grad, 0.01)
        assert optimizer.step == 3
        states.append({"values": values, **optimizer.state})
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        # Moments may round to neighbours, and what they move differs by as much.
        tolerance = 1e-2 if tensor.dtype == BF16 else 1e-3
        torch.testing.assert_close(states[1][key], tensor, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("deposit_bytes", [0, 1])
def test_gradient_of_a_shard_is_summed_with_its_backend(
    deposit_bytes: int, backend: Backend, device: torch.device
) -> None:
    gradients = []
    records = [(torch.randint(6, (12,), dtype=torch.int32), torch.randn(12), torch.randn(3, 20)) for _ in range(3)]
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    for each in (TORCH, backend):
        shard = ValueShard(part_of(6, 20), seed=1, dtype=BF16, device=device, deposit_bytes=deposit_bytes, backend=each)
        for row_index, weight, grad in records:
            shard.backward(row_index, weight.to(BF16), offsets, grad.to(BF16))
        gradients.append(shard.take_gradient())
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_a_shard_and_its_optimizer_compute_with_the_backend_they_were_given(
    name: str, checking: Backend, device: torch.device
) -> None:
    # Only this backend looks for rows out of range.
    shard = ValueShard(part_of(6, 20), seed=1, dtype=FLOAT32, device=device, backend=checking)
    settings = OptimizerSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, column_tile=8, backend=checking)
    optimizer = make_table_optimizer(f"row_{name}", shard.values, shard.part, settings)
    beyond, offsets = torch.tensor([6], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    weight, vector = torch.ones(1), torch.ones(1, 20)
    for compute in (
        lambda: shard.gather(beyond, weight, offsets),
        lambda: shard.backward(beyond, weight, offsets, vector),
        lambda: shard.dot(beyond, offsets, vector),
        lambda: shard.dot_backward(beyond, weight, offsets, vector),
        lambda: optimizer.update(beyond, vector, 0.1),
    ):
        with pytest.raises(IndexError, match="ids from 6 to 6, but they are 0 to 5"):
            compute()
