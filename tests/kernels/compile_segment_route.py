"""Launches of routes, packing and unpacking that are compiled for GPUs."""

import torch

from compiled import Case
from mempar.dims import even_cuts
from mempar.kernels.dispatch import Backend
from mempar.kernels.segment_route import fused, pack_columns, unpack_columns

TRITON = Backend(name="triton")
BF16, FLOAT32 = torch.bfloat16, torch.float32


def bucket(reads: int, dtype: torch.dtype, *, merge: bool) -> object:
    """Sixteen tokens and eight owners."""
    cuts = torch.tensor(even_cuts(2**26 + 3, 8))
    return fused.bucket(torch.zeros(16, reads, dtype=dtype), cuts, merge)


def entries(dtype: torch.dtype) -> None:
    """Sixteen reads of eight entries in three parts."""
    index = torch.zeros(16, dtype=torch.int32)
    fused.add_reads(torch.zeros(16, dtype=dtype), index, index[:9])
    fused.spread_entries(torch.zeros(3, 8, dtype=dtype), index)


def columns(width: int, shards: int, dtype: torch.dtype, *, tile: int = 128) -> None:
    """Sixteen tokens, three parts."""
    cuts = [min(cut * tile, width) for cut in even_cuts(-(-width // tile), shards)]
    pack_columns(torch.zeros(16, width, dtype=dtype), cuts, 3, backend=TRITON)
    unpack_columns(torch.zeros(3 * 16 * width, dtype=dtype), cuts, 16, 3, backend=TRITON)


CASES = {
    "route-128": Case(lambda: bucket(128, torch.int64, merge=False), registers=64, vector_loads=1),
    "route-128-merged": Case(lambda: bucket(128, torch.int64, merge=True), registers=96, vector_loads=1),
    "route-100-int32": Case(lambda: bucket(100, torch.int32, merge=False), registers=64, vector_loads=0),
    "entries-bf16": Case(lambda: entries(BF16), registers=96, vector_loads=0),
    "columns-4096-bf16": Case(lambda: columns(4096, 8, BF16), registers=64, vector_loads=4),
    "columns-2048-bf16": Case(lambda: columns(2048, 3, BF16), registers=64, vector_loads=4),
    "columns-768-float32": Case(lambda: columns(768, 5, FLOAT32), registers=64, vector_loads=4),
    # Slices that do not start on 16 bytes are moved number by number.
    "columns-33-float32": Case(lambda: columns(33, 4, FLOAT32, tile=5), registers=128, vector_loads=0),
}
