"""Contests of `reduce_rows`: the gradients of a quarter lookup's reads summed by row, uniform and skewed."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.reduce_rows import reduce_rows


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the sums of uniform reads and of reads by Zipf's law, where the hottest row has one in fifteen.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: of the table that the rows belong to, at most.
    """
    # Sums of all tokens' rows, twice to be compared, would not fit beside each other.
    shape = replace(shape, tokens=shape.tokens // 4)
    num_rows, entries = shape.rows_within(table_bytes), shape.tokens * shape.reads
    weight = torch.rand(entries, device=device)
    grad = torch.randn(shape.tokens, shape.width, device=device)
    bags = torch.arange(shape.tokens, dtype=torch.int32, device=device).repeat_interleave(shape.reads)
    # The inverse of Zipf's distribution function, which grows with the logarithm of the rank.
    ranks = torch.exp(torch.rand(entries, device=device) * torch.tensor(float(num_rows)).log().item()) - 1
    for name, rows in (
        ("uniform", torch.randint(num_rows, (entries,), dtype=torch.int32, device=device)),
        ("Zipf", ranks.int().clamp_(max=num_rows - 1)),
    ):
        touched = len(rows.unique())
        sums = {"torch": lambda rows=rows: reduce_rows(rows, weight, bags, grad, backend=TORCH)}
        yield Contest(
            name=f"reduce_rows, {name}",
            ours=lambda rows=rows: reduce_rows(rows, weight, bags, grad, backend=backend),
            truth=sums["torch"],
            rivals=sums if backend.is_triton else {},
            # Gradients stay in cache, sums do not.
            num_bytes=4 * (touched * shape.width + shape.tokens * shape.width + 5 * entries),
            tolerance=torch.finfo(torch.float32).eps * entries**0.5,
            inputs={"row_index": rows, "weight": weight, "bag_index": bags, "grad": grad},
        )
