"""Triton kernels of routes, and of packing and unpacking columns.

Bucketing needs no sort over the tokens: the reads of a token fit in one tile, so one kernel counts the entries of every
(owner, token), a sum over the counts says where each of them starts, and a second kernel writes every entry to its
place. Merging sorts the tile by slot first. Nothing is atomic and nothing is added in an order that may vary. Places
are 32-bit numbers, addresses are computed in 64 bits.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.checks import require
from mempar.kernels.segment_route.native import Buckets
from mempar.kernels.weighted_gather.fused import wide_type

# Reads that a program of 4 warps holds at a time: with twice as many a thread, sorting them spills.
_TILE_READS = 512
# Most reads of a token: 32 warps hold them; sorting that many, to merge them, would spill.
_MOST_READS = 4096
_MOST_MERGED_READS = 1024
# Numbers of a program that sums or moves single ones.
_BLOCK = 1024
# Bytes of a tile of columns: 4 warps with 4 pieces of 16 bytes a thread under way.
_TILE_BYTES = 4 * 32 * 4 * 16
_MOST_COLUMNS = 1024
# Sizes that differ from call to call must not compile kernels anew.
_VARYING = ("num_entries",)
_NUM_WARPS = 4


@triton.jit
def _reads_of(slot_ptr, token, num_tokens, reads, MERGE: tl.constexpr, READS: tl.constexpr):
    """Slots of some tokens' reads, which of the token's reads they are, and which are there and the first of an entry.

    Where entries are merged, reads are in the order of their slots, equal slots in that of the reads.
    """
    column = tl.arange(0, READS)
    live = (token < num_tokens)[:, None] & (column < reads)[None, :]
    slot = tl.load(slot_ptr + (token * reads)[:, None] + column[None, :], mask=live, other=-1).to(tl.int64)
    read = tl.broadcast_to(column[None, :], slot.shape)
    first = live
    if MERGE:
        # Reads that are not there come last.
        packed = tl.sort(tl.where(live, slot * READS + read, 0x7FFFFFFFFFFFFFFF))
        slot, read = tl.where(live, packed // READS, -1), (packed & (READS - 1)).to(tl.int32)
        before = tl.broadcast_to(tl.maximum(column - 1, 0)[None, :], slot.shape)
        first = live & ((column == 0)[None, :] | (slot != tl.gather(slot, before, 1)))
    return slot, read, live, first


@triton.jit
def count_kernel(
    entry_count_ptr,
    read_count_ptr,
    slot_ptr,
    cut_ptr,
    num_tokens,
    num_shards,
    reads,
    MERGE: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
):
    """Entries, and where they are merged reads, of TOKENS tokens for every owner."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot, _, _, first = _reads_of(slot_ptr, token, num_tokens, reads, MERGE, READS)
    place = token
    for shard in range(num_shards):
        mine = (slot >= tl.load(cut_ptr + shard)) & (slot < tl.load(cut_ptr + shard + 1))
        tl.store(entry_count_ptr + place, tl.sum((mine & first).to(tl.int32), 1), mask=token < num_tokens)
        if MERGE:
            tl.store(read_count_ptr + place, tl.sum(mine.to(tl.int32), 1), mask=token < num_tokens)
        place += num_tokens


@triton.jit
def place_kernel(
    row_ptr,
    read_order_ptr,
    entry_of_read_ptr,
    offset_ptr,
    slot_ptr,
    cut_ptr,
    entry_end_ptr,
    read_end_ptr,
    entry_count_ptr,
    read_count_ptr,
    num_tokens,
    num_shards,
    reads,
    MERGE: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
):
    """Write the entries of TOKENS tokens to their places."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    slot, read, live, first = _reads_of(slot_ptr, token, num_tokens, reads, MERGE, READS)
    # Merged reads are in the order of owners already, so that one count serves them all.
    entry_rank = tl.cumsum(first.to(tl.int32), 1) - 1
    read_rank = tl.broadcast_to(tl.arange(0, READS)[None, :], slot.shape)
    entries_before = tl.zeros([TOKENS], tl.int32)
    reads_before = tl.zeros([TOKENS], tl.int32)
    entry = tl.zeros([TOKENS, READS], tl.int32)
    place = tl.zeros([TOKENS, READS], tl.int32)
    row = slot
    segment = token
    for shard in range(num_shards):
        cut = tl.load(cut_ptr + shard)
        mine = (slot >= cut) & (slot < tl.load(cut_ptr + shard + 1))
        row = tl.where(mine, slot - cut, row)
        num_entries = tl.load(entry_count_ptr + segment, mask=inside, other=0)
        start = tl.load(entry_end_ptr + segment, mask=inside, other=0) - num_entries
        if MERGE:
            entry = tl.where(mine, (start - entries_before)[:, None] + entry_rank, entry)
            num_reads = tl.load(read_count_ptr + segment, mask=inside, other=0)
            read_start = tl.load(read_end_ptr + segment, mask=inside, other=0) - num_reads
            place = tl.where(mine, (read_start - reads_before)[:, None] + read_rank, place)
            entries_before += num_entries
            reads_before += num_reads
        else:
            entry = tl.where(mine, start[:, None] + tl.cumsum(mine.to(tl.int32), 1) - 1, entry)
        segment += num_tokens
    if not MERGE:
        place = entry
    number = (token * reads)[:, None] + read
    tl.store(row_ptr + entry.to(tl.int64), row.to(tl.int32), mask=first)
    tl.store(read_order_ptr + place.to(tl.int64), number.to(tl.int32), mask=live)
    tl.store(entry_of_read_ptr + number, entry, mask=live)
    if MERGE:
        tl.store(offset_ptr + entry.to(tl.int64), place, mask=first)


@triton.jit(do_not_specialize=_VARYING)
def add_kernel(out_ptr, per_read_ptr, read_order_ptr, offset_ptr, num_entries, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the reads of BLOCK entries, each in the order of its reads."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < num_entries
    start = tl.load(offset_ptr + entry, mask=live, other=0).to(tl.int64)
    end = tl.load(offset_ptr + entry + 1, mask=live, other=0).to(tl.int64)
    total = tl.zeros([BLOCK], WIDE)
    for step in range(0, tl.max(end - start, 0)):
        here = start + step < end
        read = tl.load(read_order_ptr + start + step, mask=here, other=0).to(tl.int64)
        total += tl.load(per_read_ptr + read, mask=here, other=0).to(WIDE)
    tl.store(out_ptr + entry, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def spread_kernel(
    out_ptr,
    part_ptr,
    entry_ptr,
    num_reads,
    num_entries,
    num_parts,
    MOVED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the parts of BLOCK reads' entries."""
    read = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = read < num_reads
    entry = read
    if MOVED:
        entry = tl.load(entry_ptr + read, mask=live, other=0).to(tl.int64)
    total = tl.load(part_ptr + entry, mask=live, other=0).to(WIDE)
    for _ in range(1, num_parts):
        entry += num_entries
        total += tl.load(part_ptr + entry, mask=live, other=0).to(WIDE)
    tl.store(out_ptr + read, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _slice_of(shard, CUTS: tl.constexpr, ALIGN: tl.constexpr):
    """First column and width of a slice; the cuts of a run are few and fixed, so they are part of the kernel."""
    start = shard * 0
    end = shard * 0
    for each in tl.static_range(len(CUTS) - 1):
        start = tl.where(shard == each, CUTS[each], start)
        end = tl.where(shard == each, CUTS[each + 1], end)
    return tl.multiple_of(start, ALIGN), tl.multiple_of(end - start, ALIGN)


@triton.jit
def pack_kernel(
    out_ptr,
    in_ptr,
    num_tokens,
    token_stride,
    column_stride,
    copies,
    CUTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS tokens and a block of columns of one slice, read once and written as often as it is sent."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    start, width = _slice_of(tl.program_id(1) // BLOCKS, CUTS, ALIGN)
    column = (tl.program_id(1) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < num_tokens)[:, None] & (column < width)[None, :]
    numbers = in_ptr + (token * token_stride)[:, None] + ((start + column).to(tl.int64) * column_stride)[None, :]
    numbers = tl.load(numbers, mask=inside, other=0)
    # The parts of the slices before this one, and then those of this one.
    place = (start.to(tl.int64) * num_tokens * copies + token * width)[:, None] + column[None, :]
    for _ in range(copies):
        tl.store(out_ptr + place, numbers, mask=inside)
        place += width.to(tl.int64) * num_tokens


@triton.jit
def unpack_kernel(
    out_ptr,
    in_ptr,
    num_tokens,
    num_columns,
    parts,
    CUTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS tokens and a block of columns of one slice: its parts are added first to last."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    start, width = _slice_of(tl.program_id(1) // BLOCKS, CUTS, ALIGN)
    column = (tl.program_id(1) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < num_tokens)[:, None] & (column < width)[None, :]
    place = (start.to(tl.int64) * num_tokens * parts + token * width)[:, None] + column[None, :]
    total = tl.load(in_ptr + place, mask=inside, other=0).to(WIDE)
    for _ in range(1, parts):
        place += width.to(tl.int64) * num_tokens
        total += tl.load(in_ptr + place, mask=inside, other=0).to(WIDE)
    out = out_ptr + (token * num_columns)[:, None] + (start + column)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def bucket(slot_index: Tensor, row_cuts: Tensor, merge: bool) -> Buckets:
    """Bucket reads by owner; the host does not wait.

    Args:
        slot_index: `[T, M] int32 or int64`, contiguous.
        row_cuts: `[R + 1] int64`.
        merge: whether reads of a token that chose the same slot become one entry.

    Raises:
        ValueError: a token has more reads than a program can hold.
    """
    most = _MOST_MERGED_READS if merge else _MOST_READS
    require(slot_index.shape[1] <= most, "slot_index", slot_index, f"at most {most} reads a token")
    num_tokens, reads = slot_index.shape
    num_shards, num_reads = row_cuts.numel() - 1, slot_index.numel()
    # [1 or 2, R, T]: entries, and where they are merged reads
    counts = row_cuts.new_empty(1 + merge, num_shards, num_tokens, dtype=torch.int32)
    row_index, read_order, entry_of_read = (counts.new_empty(num_reads) for _ in range(3))
    # What follows the last entry's start is its end.
    offsets = counts.new_full((num_reads + 1,), num_reads) if merge else None
    if not num_reads:
        return Buckets(row_index, counts[0].zero_(), read_order, entry_of_read, offsets)
    tile_reads = triton.next_power_of_2(reads)
    tile = {
        "TOKENS": max(1, _TILE_READS // tile_reads),
        "READS": tile_reads,
        "MERGE": merge,
        "num_warps": _NUM_WARPS * max(1, tile_reads // _TILE_READS),
    }
    grid = (triton.cdiv(num_tokens, tile["TOKENS"]),)
    sizes = (num_tokens, num_shards, reads)
    count_kernel[grid](counts[0], counts[-1], slot_index, row_cuts, *sizes, **tile)
    ends = counts.view(1 + merge, -1).cumsum(1, dtype=torch.int32)
    place_kernel[grid](
        row_index,
        read_order,
        entry_of_read,
        row_index if offsets is None else offsets,
        slot_index,
        row_cuts,
        ends[0],
        ends[-1],
        counts[0],
        counts[-1],
        *sizes,
        **tile,
    )
    return Buckets(row_index, counts[0], read_order, entry_of_read, offsets)


def add_reads(per_read: Tensor, read_order: Tensor, offsets: Tensor) -> Tensor:
    """Sum `[T*M]` numbers entry by entry, in the order of the reads: `[E]`."""
    out = per_read.new_empty(offsets.numel() - 1)
    if out.numel():
        add_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            out,
            per_read,
            read_order,
            offsets,
            out.numel(),
            WIDE=wide_type(out.dtype),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return out


def spread_entries(parts: Tensor, entry_of_read: Tensor | None) -> Tensor:
    """Sum `[N, E]` over the parts and give every read its entry's number: `[T*M]`."""
    num_parts, num_entries = parts.shape
    out = parts.new_empty(num_entries if entry_of_read is None else entry_of_read.numel())
    if out.numel():
        spread_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            out,
            parts,
            parts if entry_of_read is None else entry_of_read,
            out.numel(),
            num_entries,
            num_parts,
            MOVED=entry_of_read is not None,
            WIDE=wide_type(parts.dtype),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return out


def pack_columns(numbers: Tensor, column_cuts: Sequence[int], copies: int) -> Tensor:
    """Lay column slices one after the other; see the public operation."""
    num_tokens, width = numbers.shape
    out = numbers.new_empty(copies * num_tokens * width)
    if out.numel():
        grid, tile = _tiles(num_tokens, column_cuts, numbers.element_size())
        pack_kernel[grid](out, numbers, num_tokens, *numbers.stride(), copies, **tile)
    return out


def unpack_columns(pieces: Tensor, column_cuts: Sequence[int], num_tokens: int, parts: int) -> Tensor:
    """Put columns together from summed parts; see the public operation."""
    out = pieces.new_empty(num_tokens, column_cuts[-1])
    if out.numel():
        grid, tile = _tiles(num_tokens, column_cuts, pieces.element_size())
        unpack_kernel[grid](out, pieces, num_tokens, column_cuts[-1], parts, WIDE=wide_type(pieces.dtype), **tile)
    return out


def _tiles(num_tokens: int, column_cuts: Sequence[int], element_size: int) -> tuple[tuple[int, int], dict[str, object]]:
    """Programs and tiles that cover all tokens and slices; every program has columns of one slice."""
    widest = max(end - start for start, end in itertools.pairwise(column_cuts))
    columns = min(triton.next_power_of_2(widest), _MOST_COLUMNS)
    tokens = max(1, _TILE_BYTES // (columns * element_size))
    blocks = triton.cdiv(widest, columns)
    # Slices that start on 16 bytes can be moved in pieces of 16 bytes.
    align = math.gcd(16, *column_cuts)
    grid = (triton.cdiv(num_tokens, tokens), blocks * (len(column_cuts) - 1))
    return grid, {
        "CUTS": tuple(column_cuts),
        "ALIGN": align,
        "BLOCKS": blocks,
        "TOKENS": tokens,
        "COLUMNS": columns,
        "num_warps": _NUM_WARPS,
    }
