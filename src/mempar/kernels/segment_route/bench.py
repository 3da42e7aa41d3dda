"""Contests of `segment_route`: entries sorted by owner, merged or not, and slices packed for the exchange."""

from collections.abc import Iterator

import torch

from mempar.dims import even_cuts
from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.segment_route import pack_columns, route, unpack_columns

# Owners of rows, or of columns.
_SHARDS = 8


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield routes to eight owners of rows, and the packing for eight owners of columns.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: not looked at: no table is read.
    """
    slots = torch.randint(shape.subkeys**2, (shape.tokens, shape.reads), device=device)
    row_cuts = torch.tensor(even_cuts(shape.subkeys**2, _SHARDS), device=device)
    for merge in (False, True):
        torch_way = {"torch": lambda merge=merge: route(slots, row_cuts, merge=merge, backend=TORCH)}
        yield Contest(
            name="route, merged" if merge else "route",
            ours=lambda merge=merge: route(slots, row_cuts, merge=merge, backend=backend).row_index,
            truth=lambda merge=merge: route(slots, row_cuts, merge=merge, backend=TORCH).row_index,
            rivals=torch_way if backend.is_triton else {},
            # A slot in; its row and its place out.
            num_bytes=slots.numel() * (8 + 4 + 8),
            inputs={"slot_index": slots, "row_cuts": row_cuts},
        )
    numbers = torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype)
    # On the units in which columns are cut.
    cuts = [cut * (shape.width // _SHARDS) for cut in range(_SHARDS + 1)]
    packed = pack_columns(numbers, cuts, 1, backend=TORCH)
    num_bytes = 2 * numbers.numel() * shape.value_bytes
    yield Contest(
        name="pack_columns",
        ours=lambda: pack_columns(numbers, cuts, 1, backend=backend),
        truth=lambda: packed,
        rivals={"torch": lambda: pack_columns(numbers, cuts, 1, backend=TORCH)} if backend.is_triton else {},
        num_bytes=num_bytes,
    )
    yield Contest(
        name="unpack_columns",
        ours=lambda: unpack_columns(packed, cuts, shape.tokens, 1, backend=backend),
        truth=lambda: numbers,
        rivals={"torch": lambda: unpack_columns(packed, cuts, shape.tokens, 1, backend=TORCH)}
        if backend.is_triton
        else {},
        num_bytes=num_bytes,
    )
