"""The definition of `update_rows` on rows that are already gathered, tile by tile, for tests."""

import torch
from torch import Tensor


def adagrad(
    values: Tensor, accumulator: Tensor, grad: Tensor, *, column_tile: int, lr: float, eps: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New values `[U, D']` and statistics `[U, tiles]`."""
    pieces, statistics = [], []
    tiles = zip(values.split(column_tile, 1), grad.split(column_tile, 1), accumulator.unbind(1), strict=True)
    for value, part, statistic in tiles:
        statistic = statistic + part.square().mean(1)
        step = part / (statistic.sqrt()[:, None] + eps)
        pieces.append((1 - lr * weight_decay) * value - lr * step)
        statistics.append(statistic)
    return torch.cat(pieces, 1), torch.stack(statistics, 1)


def adam(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New values `[U, D']` and moments `[U, D']`."""
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    mean, root = exp_avg / (1 - beta1**step), (exp_avg_sq / (1 - beta2**step)).sqrt()
    return (1 - lr * weight_decay) * values - lr * mean / (root + eps), exp_avg, exp_avg_sq
