"""Digests of logical tensors `[S, D]` that do not depend on how they are cut.

The digest of a tensor is a sum, modulo 2^64, of one hash for each element, keyed by the tensor's name
and the element's row and column in the whole tensor. Sums have no order, so the digests of the pieces
of any cut, into rows, columns or blocks, add up to the digest of the whole; equal bits give equal
digests, and one changed element always changes it, because the hash of a position is a bijection of
the element's bits. It tells copies apart and checkpoints alike; it is no defence against forgery.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mempar.memory.hashing import GOLDEN_GAMMA, mix, name_key

# Elements hashed at a time: bounds the temporaries (8 bytes each, a few of them) to some 50 MB.
_CHUNK_ELEMENTS = 1 << 20
# Odd; another number than the one that spreads columns.
_BITS_FACTOR = 0xD1342543DE82EF95 - (1 << 64)
_BITS_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(name: str, block: Tensor, row_start: int = 0, column_start: int = 0) -> Tensor:
    """Digest a block of a logical tensor.

    Args:
        name: the logical tensor's name; tensors with different names have unrelated digests.
        block: `[rows, columns]`, or one number a row `[rows]`; any dtype of 1, 2, 4 or 8 bytes.
        row_start: row of the whole tensor at which the block begins.
        column_start: its first column, in units of this tensor's columns (tiles, for statistics a tile).

    Returns:
        `[] int64`; digests of disjoint blocks add up, wrapping around.
    """
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    for _, hashes in _row_digests(name, block, row_start, column_start):
        total += hashes.sum()
    return total


def digest_bands(name: str, block: Tensor, row_start: int, column_start: int, cuts: list[int]) -> Tensor:
    """Digest bands of rows of a block, to find where two copies differ.

    Args:
        name: as in `digest`.
        block: as in `digest`.
        row_start: as in `digest`.
        column_start: as in `digest`.
        cuts: boundaries of the bands, rows of the block, ascending; band i is `[cuts[i], cuts[i + 1])`.

    Returns:
        `[len(cuts) - 1] int64`.
    """
    bounds = torch.tensor(cuts, device=block.device)
    bands = torch.zeros(len(cuts) - 1, dtype=torch.int64, device=block.device)
    part = block[cuts[0] : cuts[-1]]
    for first, hashes in _row_digests(name, part, row_start + cuts[0], column_start):
        row = torch.arange(cuts[0] + first, cuts[0] + first + len(hashes), device=block.device)
        # Integers: the sum is exact in any order.
        bands.index_add_(0, torch.bucketize(row, bounds[1:-1], right=True), hashes)
    return bands


def _row_digests(name: str, block: Tensor, row_start: int, column_start: int) -> Iterator[tuple[int, Tensor]]:
    """Chunks of (first row, one digest a row `[rows] int64`)."""
    block = block.detach()
    flat = block[:, None] if block.dim() == 1 else block.flatten(1)
    key = name_key(name, block.device)
    column = torch.arange(column_start, column_start + flat.shape[1], device=block.device) * GOLDEN_GAMMA
    bits_dtype = _BITS_DTYPE[block.element_size()]
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, flat.shape[1]))
    for first in range(0, len(flat), rows_at_once):
        part = flat[first : first + rows_at_once]
        row = torch.arange(row_start + first, row_start + first + len(part), device=block.device)
        # Not in place below: of 8-byte elements these are the very bits of the block.
        bits = part.contiguous().view(bits_dtype).to(torch.int64)
        position = mix(row.mul_(GOLDEN_GAMMA).add_(key))[:, None] + column[None, :]
        yield first, mix((bits * _BITS_FACTOR).add_(position)).sum(1)
