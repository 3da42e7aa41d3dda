"""Shards at awkward sizes with the state of a rule, and what one update of them should give."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import interpreted
from mempar.kernels.row_update import Adagrad, Adam, Rule, TableRows, reference

STEP, SCALE = 3, 0.25
COEFFICIENTS = {"lr": 0.05, "eps": 1e-8, "weight_decay": 0.1}
BETAS = {"beta1": 0.9, "beta2": 0.95}
BF16 = torch.bfloat16


def part_of(num_rows: int, width: int, row_start: int = 0, column_start: int = 0) -> TableSlice:
    """A slice that ends where its table does, columns first."""
    return TableSlice(
        num_slots=row_start + num_rows,
        value_dim=column_start + width,
        row_start=row_start,
        row_end=row_start + num_rows,
        column_start=column_start,
        column_end=column_start + width,
    )


def make_table(
    name: str,
    part: TableSlice,
    dtype: torch.dtype,
    *,
    rounding: str = "master",
    moments: torch.dtype | None = None,
    column_tile: int = 8,
    seed: int = 5,
) -> tuple[TableRows, Rule]:
    """Values between columns of NaN, and the state of row-wise Adagrad or Adam."""
    num_rows, width = part.num_rows, part.num_columns
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.full((num_rows, width + 5), torch.nan).to(dtype)[:, 2 : 2 + width]
    values.copy_(torch.randn(num_rows, width))
    master = values.to(wide).contiguous() if rounding == "master" and dtype != wide else None
    table = TableRows(values=values, part=part, master=master, stochastic=rounding == "stochastic", seed=seed)
    if name == "adagrad":
        accumulator = 0.1 + torch.rand(num_rows, -(-width // column_tile)).to(wide)
        return table, Adagrad(accumulator=accumulator, column_tile=column_tile, **COEFFICIENTS)
    exp_avg = torch.randn(num_rows, width).to(moments or wide)
    exp_avg_sq = (0.1 + torch.rand(num_rows, width)).to(moments or wide)
    return table, Adam(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **COEFFICIENTS, **BETAS)


def tensors_of(table: TableRows, rule: Rule) -> dict[str, Tensor]:
    """What an update changes, by name."""
    named = {"values": table.values} | ({} if table.master is None else {"master": table.master})
    if isinstance(rule, Adagrad):
        return named | {"accumulator": rule.accumulator}
    return named | {"exp_avg": rule.exp_avg, "exp_avg_sq": rule.exp_avg_sq}


def state_of(table: TableRows, rule: Rule) -> dict[str, Tensor]:
    """The rule's part of it."""
    return {key: tensor for key, tensor in tensors_of(table, rule).items() if key not in ("values", "master")}


def copy_of(table: TableRows, rule: Rule) -> tuple[TableRows, Rule]:
    """The same values and state in other memory."""
    # Guarded columns come along.
    around = table.values.as_strided(
        (len(table.values), table.values.stride(0)), (table.values.stride(0), 1), 0
    ).clone()
    values = around[:, 2 : 2 + table.values.shape[1]]
    master = None if table.master is None else table.master.clone()
    state: dict[str, Any] = {key: tensor.clone() for key, tensor in state_of(table, rule).items()}
    return replace(table, values=values, master=master), replace(rule, **state)


def expected_update(table: TableRows, rule: Rule, rows: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The touched rows afterwards, in float64 and before rounding."""
    rows, grad = rows.long(), grad.double() * SCALE
    state = [tensor[rows].double() for tensor in state_of(table, rule).values()]
    given = {key: getattr(rule, key) for key in COEFFICIENTS}
    source = table.source[rows].double()
    if isinstance(rule, Adagrad):
        values, accumulator = reference.adagrad(source, *state, grad, column_tile=rule.column_tile, **given)
        return {"values": values, "master": values, "accumulator": accumulator}
    values, exp_avg, exp_avg_sq = reference.adam(source, *state, grad, step=STEP, **given, **BETAS)
    return {"values": values, "master": values, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def assert_updated(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    rows: Tensor,
    expected: dict[str, Tensor],
    rounding: str,
    num_terms: int = 1,
) -> None:
    """Touched rows are as expected and the others as they were, bit for bit; gradients are sums of terms."""
    others = torch.ones(len(before["values"]), dtype=torch.bool)
    others[rows.long()] = False
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        same = tensor[others], before[key][others]
        torch.testing.assert_close(*same, rtol=0, atol=0, equal_nan=True)
        # A dozen roundings of numbers below 10, a sum of at most 128 squares, and a rounding a term.
        wide = torch.float32 if tensor.dtype == BF16 else tensor.dtype
        near = expected[key]
        tolerance = (64 + num_terms) * torch.finfo(wide).eps * near.abs().clamp(min=1)
        if tensor.dtype == BF16:
            to_nearest = key == "values" and rounding != "stochastic"
            # Triton's interpreter cuts off what does not fit in bf16.
            steps = 0.5 if to_nearest and not interpreted() else 1.0
            tolerance = tolerance + steps * torch.finfo(BF16).eps * near.abs()
        error = (tensor[rows.long()].double() - near).abs()
        assert bool((error <= tolerance).all()), f"{key}: largest error {error.max()}"
