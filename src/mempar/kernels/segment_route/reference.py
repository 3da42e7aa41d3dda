"""The definition of routes and of packed columns, read by read, for tests."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def entries_of(slot_index: Tensor, row_cuts: Sequence[int], merge: bool) -> list[list[tuple[int, int, list[int]]]]:
    """For each owner its entries: token, row of the owner's shard, and which of the token's reads they are."""
    owners = []
    for start, end in itertools.pairwise(row_cuts):
        entries: list[tuple[int, int, list[int]]] = []
        for token, slots in enumerate(slot_index.tolist()):
            mine = [(read, slot - start) for read, slot in enumerate(slots) if start <= slot < end]
            if merge:
                rows = sorted({row for _, row in mine})
                entries += [(token, row, [read for read, other in mine if other == row]) for row in rows]
            else:
                entries += [(token, row, [read]) for read, row in mine]
        owners.append(entries)
    return owners


def pack_columns(numbers: Tensor, column_cuts: Sequence[int], copies: int) -> Tensor:
    """`[R*T*D]`: for each slice of columns R times its numbers, token by token."""
    slices = itertools.pairwise(column_cuts)
    flat = [numbers[:, start:end].flatten() for start, end in slices for _ in range(copies)]
    return torch.cat(flat)


def unpack_columns(pieces: Tensor, column_cuts: Sequence[int], num_tokens: int, parts: int) -> Tensor:
    """`[T, D]`: number (t, d) is the sum of R numbers of `pieces`, added first to last."""
    out = pieces.new_zeros(num_tokens, column_cuts[-1])
    place = 0
    for start, end in itertools.pairwise(column_cuts):
        for _ in range(parts):
            size = num_tokens * (end - start)
            out[:, start:end] += pieces[place : place + size].view(num_tokens, end - start)
            place += size
    return out
