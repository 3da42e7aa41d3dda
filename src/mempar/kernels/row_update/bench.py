"""Contests of `row_update`: reduced gradients applied, deposits reduced and applied, and backward with its update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mempar.dims import TableSlice, column_tiles
from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.row_update import (
    Adagrad,
    Adam,
    Rule,
    TableRows,
    backward_and_update,
    reduce_and_update,
    update_rows,
)

_TILE = 128
# Reads and rows of the sample that is compared with torch.
_SAMPLE_TOKENS, _SAMPLE_ROWS = 32, 256


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """A shard with a rule, and what a lookup deposits in it."""

    table: TableRows
    rule: Rule
    row_index: Tensor
    weight: Tensor
    bag_index: Tensor
    grad: Tensor

    def touched(self, most: int) -> tuple[Tensor, Tensor]:
        """Distinct rows and a gradient of each, at most so many."""
        rows = self.row_index.unique()[:most]
        grad = torch.randn(len(rows), self.grad.shape[1], dtype=torch.float32, device=rows.device)
        return rows, grad

    def deposit(self, backend: Backend) -> Tensor:
        """Reduce and apply."""
        grads = [self.grad]
        return reduce_and_update(
            self.table, self.rule, self.row_index, self.weight, self.bag_index, grads, step=1, backend=backend
        )

    def backward(self, backend: Backend) -> Tensor:
        """Differentiate and apply."""
        return backward_and_update(
            self.table, self.rule, self.row_index, self.weight, self.bag_index, self.grad, step=1, backend=backend
        )


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield updates by row-wise Adagrad, bf16 values rounded stochastically, and by Adam with bf16 moments.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: of the table, at most; gradients take a quarter of that.
    """
    for name, state_bytes in (("adagrad", 8 / _TILE), ("adam", 4 * shape.value_bytes)):
        # Values, two moments and gradients lie side by side.
        reads = _reads(shape, device, table_bytes // 4, name)
        rows, grad = reads.touched(table_bytes // 4 // (4 * shape.width))
        row_bytes = shape.width * (2 * shape.value_bytes + state_bytes)
        yield Contest(
            name=f"row_update, {name}",
            ours=lambda reads=reads, rows=rows, grad=grad: update_rows(
                reads.table, reads.rule, rows, grad, step=1, backend=backend
            ),
            **_compared(shape, device, name, backend, _apply),
            rivals=_torch(
                backend,
                lambda reads=reads, rows=rows, grad=grad: update_rows(
                    reads.table, reads.rule, rows, grad, step=1, backend=TORCH
                ),
            ),
            num_bytes=round(len(rows) * (row_bytes + 4 * shape.width)),
        )
        touched = len(reads.row_index.unique())
        num_bytes = round(touched * row_bytes) + shape.tokens * shape.width * shape.value_bytes
        for what, run in (("reduce_and_update", _Reads.deposit), ("backward_and_update", _Reads.backward)):
            yield Contest(
                name=f"{what}, {name}",
                ours=lambda run=run, reads=reads: run(reads, backend),
                **_compared(shape, device, name, backend, run),
                rivals=_torch(backend, lambda run=run, reads=reads: run(reads, TORCH)),
                num_bytes=num_bytes + 20 * len(reads.row_index),
            )


def _reads(shape: Shape, device: torch.device, table_bytes: int, name: str) -> _Reads:
    num_rows, entries = shape.rows_within(table_bytes), shape.tokens * shape.reads
    part = TableSlice(
        num_slots=num_rows, value_dim=shape.width, row_start=0, row_end=num_rows, column_start=0, column_end=shape.width
    )
    values = torch.empty(num_rows, shape.width, dtype=shape.dtype, device=device).normal_(std=0.02)
    table = TableRows(values=values, part=part, stochastic=True, seed=1)
    rule: Rule
    if name == "adagrad":
        tiles = column_tiles(part, _TILE).num_columns
        accumulator = torch.zeros(num_rows, tiles, dtype=table.wide, device=device)
        rule = Adagrad(accumulator=accumulator, column_tile=_TILE, lr=1e-3, eps=1e-8, weight_decay=0.0)
    else:
        moments = [torch.zeros_like(values) for _ in range(2)]
        rule = Adam(
            exp_avg=moments[0], exp_avg_sq=moments[1], lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0
        )
    return _Reads(
        table=table,
        rule=rule,
        row_index=torch.randint(num_rows, (entries,), dtype=torch.int32, device=device),
        weight=torch.rand(entries, device=device),
        bag_index=torch.arange(shape.tokens, dtype=torch.int32, device=device).repeat_interleave(shape.reads),
        grad=torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype),
    )


def _apply(reads: _Reads, backend: Backend) -> None:
    generator = torch.Generator(reads.grad.device).manual_seed(3)
    rows = reads.row_index.unique()
    grad = torch.randn(len(rows), reads.grad.shape[1], generator=generator, device=rows.device)
    update_rows(reads.table, reads.rule, rows, grad, step=1, backend=backend)


def _compared(
    shape: Shape, device: torch.device, name: str, backend: Backend, run: Callable[[_Reads, Backend], object]
) -> dict[str, Any]:
    """What a contest compares: values after one update of a small table, from the same start by both ways."""

    def after(by: Backend) -> Tensor:
        torch.manual_seed(2)
        few = replace(shape, tokens=_SAMPLE_TOKENS)
        reads = _reads(few, device, _SAMPLE_ROWS * shape.width * shape.value_bytes, name)
        run(reads, by)
        return reads.table.values

    # Stochastic rounding takes a number to one of its neighbours: sums in another order may take the other.
    tolerance = torch.finfo(shape.dtype).eps
    return {"sample": lambda: after(backend), "truth": lambda: after(TORCH), "tolerance": tolerance}


def _torch(backend: Backend, function: Callable[[], object]) -> dict[str, Callable[[], object]]:
    return {"torch": function} if backend.is_triton else {}
