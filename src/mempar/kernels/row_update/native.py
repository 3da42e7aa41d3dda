"""`update_rows` of torch's own operators: what runs on CPUs. Rows are updated some at a time."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.kernels.blocking import CHUNK_ELEMENTS
from mempar.kernels.row_update.rows import Adagrad, Adam, Rule, TableRows


def update_rows(table: TableRows, rule: Rule, rows: Tensor, grad: Tensor, *, step: int, scale: float) -> None:
    """Apply a rule to touched rows; see the public operation."""
    rows = rows.long()
    for block in blocks(len(rows), table.values.shape[1], CHUNK_ELEMENTS):
        part = grad[block].to(table.wide)
        if scale != 1.0:
            part = part * scale
        if isinstance(rule, Adagrad):
            _adagrad(table, rule, rows[block], part, step)
        else:
            _adam(table, rule, rows[block], part, step)


def blocks(count: int, width: int, chunk_elements: int) -> Iterator[slice]:
    """Ranges of at most so many rows that temporaries stay bounded."""
    at_once = max(1, chunk_elements // max(1, width))
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))


def _adagrad(table: TableRows, rule: Adagrad, index: Tensor, grad: Tensor, step: int) -> None:
    tile, width, num_tiles = rule.column_tile, grad.shape[1], rule.accumulator.shape[1]
    # The last tile of a table may be narrower.
    starts = tile * torch.arange(num_tiles, device=grad.device)
    widths = (width - starts).clamp(max=tile).to(table.wide)
    squares = F.pad(grad.square(), (0, num_tiles * tile - width))
    accumulator = rule.accumulator.index_select(0, index)
    accumulator += squares.view(len(index), -1, tile).sum(-1).div_(widths)
    rule.accumulator.index_copy_(0, index, accumulator)
    root = accumulator.sqrt().add_(rule.eps)
    weight = table.read(index).mul_(1.0 - rule.lr * rule.weight_decay)
    weight.addcdiv_(grad, root.repeat_interleave(tile, dim=1)[:, :width], value=-rule.lr)
    table.write(index, weight, step)


def _adam(table: TableRows, rule: Adam, index: Tensor, grad: Tensor, step: int) -> None:
    exp_avg = rule.exp_avg.index_select(0, index).to(table.wide)
    exp_avg_sq = rule.exp_avg_sq.index_select(0, index).to(table.wide)
    exp_avg.lerp_(grad, 1.0 - rule.beta1)
    exp_avg_sq.mul_(rule.beta2).addcmul_(grad, grad, value=1.0 - rule.beta2)
    weight = table.read(index)
    move_by_adam(weight, exp_avg, exp_avg_sq, rule, step)
    table.write(index, weight, step)
    for name, kept, moment in (("exp_avg", rule.exp_avg, exp_avg), ("exp_avg_sq", rule.exp_avg_sq, exp_avg_sq)):
        if kept.dtype != table.wide:
            moment = table.rounder.stochastic(moment, index, step, name)
        kept.index_copy_(0, index, moment)


def move_by_adam(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rule: Adam, step: int) -> None:
    """Decay and move values by moments that have seen the step's gradient.

    Args:
        weight: `[rows, D_j]`, changed in place.
        exp_avg: `[rows, D_j]`.
        exp_avg_sq: `[rows, D_j]`.
        rule: coefficients.
        step: counted from 1.
    """
    correction1 = 1.0 - rule.beta1**step
    correction2 = math.sqrt(1.0 - rule.beta2**step)
    denominator = exp_avg_sq.sqrt().div_(correction2).add_(rule.eps)
    weight.mul_(1.0 - rule.lr * rule.weight_decay)
    weight.addcdiv_(exp_avg, denominator, value=-rule.lr / correction1)
