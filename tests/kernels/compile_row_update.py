"""Launches of `row_update` that are compiled for GPUs."""

from typing import Any

import torch

from compiled import Case
from mempar.dims import TableSlice
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows.segments import PIECE_ENTRIES
from mempar.kernels.row_update import (
    Adagrad,
    Adam,
    Rule,
    TableRows,
    backward_and_update,
    reduce_and_update,
    update_rows,
)

TRITON = Backend(name="triton")
BF16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
NUM_ROWS = 8
# One row is cut in pieces.
NUM_ENTRIES = PIECE_ENTRIES + 10


def table_and_rule(
    name: str, width: int, dtype: torch.dtype, *, master: bool = False, moments: torch.dtype = FLOAT32, tile: int = 128
) -> tuple[TableRows, Rule]:
    """A shard that rounds stochastically where it has no master."""
    part = TableSlice(
        num_slots=NUM_ROWS, value_dim=width, row_start=0, row_end=NUM_ROWS, column_start=0, column_end=width
    )
    values = torch.zeros(NUM_ROWS, width, dtype=dtype)
    wide = torch.promote_types(dtype, FLOAT32)
    table = TableRows(values=values, part=part, master=values.to(wide) if master else None, stochastic=True)
    settings = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}
    if name == "adagrad":
        accumulator = torch.zeros(NUM_ROWS, -(-width // tile), dtype=wide)
        return table, Adagrad(accumulator=accumulator, column_tile=tile, **settings)
    moments = torch.promote_types(moments, BF16 if moments == BF16 else wide)
    exp_avg = torch.zeros(NUM_ROWS, width, dtype=moments)
    return table, Adam(exp_avg=exp_avg, exp_avg_sq=exp_avg.clone(), beta1=0.9, beta2=0.95, **settings)


def update(name: str, width: int, dtype: torch.dtype, **settings: Any) -> object:
    """Reduced gradients are applied."""
    table, rule = table_and_rule(name, width, dtype, **settings)
    rows = torch.arange(3, dtype=torch.int32)
    return update_rows(table, rule, rows, torch.zeros(3, width, dtype=table.wide), step=1, backend=TRITON)


def deposits(name: str, width: int, dtype: torch.dtype, **settings: Any) -> object:
    """Two parts are summed and applied."""
    table, rule = table_and_rule(name, width, dtype, **settings)
    index = torch.zeros(NUM_ENTRIES, dtype=torch.int32)
    grads = [torch.zeros(3, width, dtype=dtype) for _ in range(2)]
    return reduce_and_update(table, rule, index, torch.zeros(NUM_ENTRIES), index, grads, step=1, backend=TRITON)


def backward(name: str, width: int, dtype: torch.dtype, **settings: Any) -> object:
    """Backward updates."""
    table, rule = table_and_rule(name, width, dtype, **settings)
    index = torch.zeros(NUM_ENTRIES, dtype=torch.int32)
    grad = torch.zeros(3, width, dtype=dtype)
    weight = torch.zeros(NUM_ENTRIES, dtype=dtype)
    return backward_and_update(table, rule, index, weight, index, grad, step=1, backend=TRITON)


CASES = {
    "adagrad-4096-bf16": Case(lambda: update("adagrad", 4096, BF16), registers=72, vector_loads=2),
    "adagrad-768-bf16-master": Case(lambda: update("adagrad", 768, BF16, master=True), registers=64, vector_loads=2),
    "adam-2048-bf16-moments": Case(lambda: update("adam", 2048, BF16, moments=BF16), registers=72, vector_loads=4),
    "adam-4096-bf16-master": Case(lambda: update("adam", 4096, BF16, master=True), registers=72, vector_loads=4),
    "adam-768-float32": Case(lambda: update("adam", 768, FLOAT32), registers=72, vector_loads=4),
    # Tiles that several warps share.
    "adagrad-512-float32-wide-tiles": Case(
        lambda: update("adagrad", 512, FLOAT32, tile=256), registers=72, vector_loads=2
    ),
    "adagrad-1024-float32-one-tile": Case(
        lambda: update("adagrad", 1024, FLOAT32, tile=1024), registers=72, vector_loads=2
    ),
    "adagrad-33-float64": Case(lambda: update("adagrad", 33, FLOAT64), registers=128, vector_loads=0),
    # A hash and a load for every number.
    "adagrad-100-bf16-odd-tiles": Case(lambda: update("adagrad", 100, BF16, tile=7), registers=128, vector_loads=0),
    "deposits-adagrad-4096-bf16": Case(lambda: deposits("adagrad", 4096, BF16), registers=72, vector_loads=4),
    "deposits-adam-2048-bf16": Case(lambda: deposits("adam", 2048, BF16, moments=BF16), registers=72, vector_loads=4),
    "backward-adagrad-4096-bf16": Case(lambda: backward("adagrad", 4096, BF16), registers=72, vector_loads=2),
    "backward-adam-2048-bf16-master": Case(
        lambda: backward("adam", 2048, BF16, master=True), registers=72, vector_loads=4
    ),
    "backward-adagrad-768-float32": Case(lambda: backward("adagrad", 768, FLOAT32), registers=72, vector_loads=4),
}
