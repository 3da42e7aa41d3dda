"""Contests of `weighted_gather` and `gather_scores`: uniform reads of a table that fills part of the device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import Backend
from mempar.kernels.weighted_gather import gather_scores, native, weighted_gather


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the forward read, with and without its gate, and the gradient of the weights.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: of the table, at most.
    """
    num_rows, entries = shape.rows_within(table_bytes), shape.tokens * shape.reads
    values = torch.empty(num_rows, shape.width, dtype=shape.dtype, device=device)
    for block in values.split(1 << 16):
        block.normal_()
    row_index = torch.randint(num_rows, (entries,), dtype=torch.int32, device=device)
    weight = torch.rand(entries, device=device).to(shape.dtype)
    offsets = torch.arange(0, entries + 1, shape.reads, dtype=torch.int32, device=device)
    grad, gate = (torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype) for _ in range(2))
    bags = torch.arange(shape.tokens, dtype=torch.int32, device=device).repeat_interleave(shape.reads)
    rows_bytes, bags_bytes = entries * shape.width * shape.value_bytes, shape.tokens * shape.width * shape.value_bytes
    entry_bytes = 4 + shape.value_bytes
    rounding = torch.finfo(shape.dtype).eps * shape.reads**0.5
    bags_given = {"values": values, "row_index": row_index, "weight": weight, "offsets": offsets}
    embedding_bag = {"torch embedding_bag": lambda: native.weighted_gather(values, row_index, weight, offsets)}
    yield Contest(
        name="weighted_gather",
        ours=lambda: weighted_gather(values, row_index, weight, offsets, backend=backend),
        truth=embedding_bag["torch embedding_bag"],
        rivals=embedding_bag,
        num_bytes=rows_bytes + bags_bytes + entries * entry_bytes,
        tolerance=rounding,
        inputs=bags_given,
    )
    yield Contest(
        name="weighted_gather, gated",
        ours=lambda: weighted_gather(values, row_index, weight, offsets, backend=backend, gate=gate),
        truth=lambda: native.weighted_gather(values, row_index, weight, offsets) * F.silu(gate),
        rivals={"torch": lambda: native.weighted_gather(values, row_index, weight, offsets) * F.silu(gate)},
        num_bytes=rows_bytes + 2 * bags_bytes + entries * entry_bytes,
        tolerance=4 * rounding,
        inputs={**bags_given, "gate": gate},
    )
    yield Contest(
        name="gather_scores",
        ours=lambda: gather_scores(values, row_index, bags, grad, backend=backend),
        truth=lambda: native.gather_scores(values, row_index, bags, grad),
        rivals={"torch": lambda: native.gather_scores(values, row_index, bags, grad)},
        num_bytes=rows_bytes + bags_bytes + entries * (8 + shape.value_bytes),
        tolerance=rounding,
        inputs={"values": values, "row_index": row_index, "bag_index": bags, "grad": grad},
    )
