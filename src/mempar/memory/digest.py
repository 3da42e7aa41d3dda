"""Digests of logical tensors that do not depend on how they are cut.

The digest of a tensor `[S, D]` is the sum, modulo 2^64, of its elements' bits, each times a key of its row
and a key of its column. Keys are odd and pseudo-random, those of rows depend on the tensor's name too. Sums
have no order, so the digests of the pieces of any cut, into rows, columns or blocks, add up to the digest of
the whole; equal bits give equal digests, one changed element always changes it, and other changes do but for
a chance of about 2^-32. One multiplication and one addition an element: it keeps up with a disk. It tells
copies apart and checkpoints alike; it is no defence against forgery.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from mempar.kernels.hashing import GOLDEN_GAMMA, mix, name_key

# Elements multiplied at a time: bounds the temporaries to a MB, which stays in a cache.
_CHUNK_ELEMENTS = 1 << 17
# Elements of 8 bytes count as two of 4: a factor of 2^63 would leave of two changed signs nothing.
_BITS_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


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
    for _, digests in _row_digests(name, block, row_start, column_start):
        total += digests.sum()
    return total


def digest_box(name: str, box: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Digest a box of a logical tensor of any number of dimensions: its rows are those of its last dimension.

    Args:
        name: as in `digest`.
        box: the part at hand, of as many dimensions as the whole.
        offset: where it begins in the whole.
        shape: of the whole.

    Returns:
        As `digest`.
    """
    if box.dim() < 2:
        return digest(name, box.reshape(-1), *offset[:1])
    total = torch.zeros((), dtype=torch.int64, device=box.device)
    for place in itertools.product(*(range(size) for size in box.shape[:-2])):
        row = 0
        for start, step, size in zip(offset, place, shape, strict=False):
            row = row * size + start + step
        total += digest(name, box[place], row * shape[-2] + offset[-2], offset[-1])
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
    for first, digests in _row_digests(name, part, row_start + cuts[0], column_start):
        row = torch.arange(cuts[0] + first, cuts[0] + first + len(digests), device=block.device)
        # Integers: the sum is exact in any order.
        bands.index_add_(0, torch.bucketize(row, bounds[1:-1], right=True), digests)
    return bands


def _row_digests(name: str, block: Tensor, row_start: int, column_start: int) -> Iterator[tuple[int, Tensor]]:
    """Chunks of (first row, one digest a row `[rows] int64`)."""
    block = block.detach()
    flat = block[:, None] if block.dim() == 1 else block.flatten(1)
    parts = max(1, block.element_size() // 4)
    key = name_key(name, block.device)
    columns = torch.arange(column_start * parts, (column_start + flat.shape[1]) * parts, device=block.device)
    column_key = _odd_keys(columns)
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, len(columns)))
    for first in range(0, len(flat), rows_at_once):
        part = flat[first : first + rows_at_once]
        rows = torch.arange(row_start + first, row_start + first + len(part), device=block.device)
        bits = part.contiguous().view(_BITS_DTYPE[block.element_size()]).to(torch.int64)
        yield first, bits.mul_(column_key).sum(1).mul_(_odd_keys(rows, key))


def _odd_keys(numbers: Tensor, key: Tensor | int = 0) -> Tensor:
    return mix(numbers.mul_(GOLDEN_GAMMA).add_(key)).bitwise_or_(1)
