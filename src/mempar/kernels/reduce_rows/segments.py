"""Entries in row order, for kernels: which belong to a row, where their gradients lie, and where long rows are cut.

Under a Zipf law a few rows take many of the reads, and one program would still sum the hottest row when all others
are done. The entries of such rows are cut in pieces of `PIECE_ENTRIES`, whose sums are added in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Most entries that one program sums.
PIECE_ENTRIES = 512
# Bytes of the widest load of a thread: rows that all start on a multiple are read in such loads.
_LOAD_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Entries sorted by row.

    Attributes:
        rows: `[U]`, the distinct rows, ascending.
        order: `[E] int64`, entries in row order; those of a row in the order in which they came.
        bounds: `[U + 1] int64`: row u has the sorted entries `[bounds[u], bounds[u + 1])`.
        first_piece: `[U + 1] int64`: row u has the pieces `[first_piece[u], first_piece[u + 1])`, none if it is short.
        pieces: `[2, pieces] int64`, first and last entry (excluded) of each piece; those at the end may be empty.
        piece_row: `[pieces] int64`, which of the U rows each belongs to.
        piece_entries: entries of a piece, and the most of a row that is not cut.
    """

    rows: Tensor
    order: Tensor
    bounds: Tensor
    first_piece: Tensor
    pieces: Tensor
    piece_row: Tensor
    piece_entries: int


def sort_segments(row_index: Tensor, piece_entries: int = PIECE_ENTRIES) -> Segments:
    """Sort entries by row and cut long rows; the host waits once, for how many rows and pieces there are.

    Args:
        row_index: `[E] int32 or int64`.
        piece_entries: entries of a piece.
    """
    sorted_row, order = torch.sort(row_index, stable=True)
    num_entries, device = len(order), order.device
    is_first = torch.ones(num_entries, dtype=torch.bool, device=device)
    torch.ne(sorted_row[1:], sorted_row[:-1], out=is_first[1:])
    # Entries behind the first piece of their row, and rows that have such: a row of n entries has at most
    # (n - piece) / piece + 2 pieces.
    is_beyond = sorted_row[piece_entries:] == sorted_row[:-piece_entries]
    num_long = (is_beyond & is_first[: max(0, num_entries - piece_entries)]).sum()
    num_rows, beyond, long = torch.stack([is_first.sum(), is_beyond.sum(), num_long]).tolist()
    # Entries that are not the first of their row are all put behind the last row.
    target = torch.where(is_first, is_first.cumsum(0) - 1, num_rows)
    rows = row_index.new_empty(num_rows + 1).scatter_(0, target, sorted_row)[:num_rows]
    bounds = target.new_empty(num_rows + 1).scatter_(0, target, torch.arange(num_entries, device=device))
    bounds[num_rows:] = num_entries
    first_piece, pieces, piece_row = _cut(bounds, beyond // piece_entries + 2 * long, piece_entries)
    return Segments(
        rows=rows,
        order=order,
        bounds=bounds,
        first_piece=first_piece,
        pieces=pieces,
        piece_row=piece_row,
        piece_entries=piece_entries,
    )


def _cut(bounds: Tensor, most_pieces: int, piece_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the rows that are longer than a piece, see `Segments`; there may be fewer pieces than are made."""
    if most_pieces == 0:
        # Nobody looks at the pieces of short rows.
        return bounds, bounds.new_empty(2, 0), bounds.new_empty(0)
    lengths = bounds.diff()
    counts = torch.where(lengths > piece_entries, (lengths + piece_entries - 1) // piece_entries, 0)
    first_piece = torch.zeros_like(bounds)
    torch.cumsum(counts, 0, out=first_piece[1:])
    piece = torch.arange(most_pieces, device=bounds.device)
    row = torch.searchsorted(first_piece[1:], piece, right=True).clamp_(max=len(counts) - 1)
    start = bounds[row] + (piece - first_piece[row]) * piece_entries
    end = torch.minimum(start + piece_entries, bounds[row + 1])
    # Made in excess.
    end = torch.where(piece < first_piece[-1], end, start)
    return first_piece, torch.stack([start, end]), row


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What kernels sum: sorted entries, their weights, and the gradients where they lie.

    Attributes:
        segments: the entries by row.
        weight: `[E]`, in row order.
        place: `[E] int64`: the gradient of a sorted entry starts so many elements behind `base`, or behind `wide_base`.
        base: a gradient part.
        wide_base: a part of the dtype of `weight`, where there are such and others.
        is_wide: `[E] bool`, which entries' gradients are behind `wide_base`, where there are both.
        num_columns: D'.
        aligned: elements that every gradient row starts on a multiple of, at most 16 bytes of the widest dtype.
    """

    segments: Segments
    weight: Tensor
    place: Tensor
    base: Tensor
    wide_base: Tensor | None
    is_wide: Tensor | None
    num_columns: int
    aligned: int


def locate_entries(
    row_index: Tensor,
    weight: Tensor,
    bag_index: Tensor,
    grads: Sequence[Tensor],
    piece_entries: int = PIECE_ENTRIES,
) -> Entries:
    """Sort entries by row and find their gradients, which are not moved.

    Args:
        row_index: `[E] int32 or int64`.
        weight: `[E]`.
        bag_index: `[E] int32 or int64`, rows of all parts one after the other.
        grads: `[B_i, D']` each; of the dtype of `weight` and one more.
        piece_entries: most entries that one program sums.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    narrow = [grad for grad in grads if grad.dtype != weight.dtype]
    wide = [grad for grad in grads if grad.dtype == weight.dtype]
    base, wide_base = (narrow or wide)[0], (wide[0] if narrow and wide else None)
    segments = sort_segments(row_index, piece_entries)
    bag = bag_index.index_select(0, segments.order)
    place, is_wide = _places(bag, grads, base, wide_base)
    return Entries(
        segments=segments,
        weight=weight.index_select(0, segments.order),
        place=place,
        base=base,
        wide_base=wide_base,
        is_wide=is_wide,
        num_columns=base.shape[1],
        # One hint serves both dtypes: the wider one's.
        aligned=_LOAD_BYTES // max(grad.element_size() for grad in grads) if all(map(_is_aligned, grads)) else 1,
    )


def _is_aligned(grad: Tensor) -> bool:
    """Whether all rows start on the bytes of the widest load."""
    return grad.data_ptr() % _LOAD_BYTES == 0 and grad.stride(0) * grad.element_size() % _LOAD_BYTES == 0


def _places(
    bag: Tensor, grads: Sequence[Tensor], base: Tensor, wide_base: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return where the gradients of bags `[E]` start, and which are behind `wide_base`; see `Entries`."""
    if len(grads) == 1:
        return bag.long() * base.stride(0), None
    # Of each part: its first bag, where bag 0 would lie if it went on so, and elements from bag to bag.
    table, first = [], 0
    for grad in grads:
        near = base if grad.dtype == base.dtype or wide_base is None else wide_base
        distance = (grad.data_ptr() - near.data_ptr()) // near.element_size()
        table.append((first, distance - first * grad.stride(0), grad.stride(0), near is wide_base))
        first += len(grad)
    # Small, from memory that the device copies from without the host waiting.
    numbers = torch.tensor(table, dtype=torch.int64, device="cpu")
    numbers = (numbers.pin_memory() if bag.is_cuda else numbers).to(bag.device, non_blocking=True)
    starts, offset, stride, is_wide = numbers.unbind(1)
    # The last part that starts at the bag or before; parts without bags are passed over.
    part = torch.searchsorted(starts.contiguous(), bag.long(), right=True).sub_(1)
    place = bag * stride[part] + offset[part]
    return place, None if wide_base is None else is_wide.bool()[part]
