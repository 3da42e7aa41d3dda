"""Reading rows of tables that stay in their files, mapped into memory for reading alone.

A mapping that cannot be written to counts neither as memory of the process nor towards `ulimit -d`, and what was read
is the first that the kernel drops when memory is short; so a table may be larger than the machine's memory. A reader
copies the distinct rows of some tokens out of the files, to the device that computes, and does there what `LocalReader`
does with a whole table: sums of rows are the same bit for bit (products with rows to rounding, which torch's operator
lets depend on how a row lies in memory). Nothing is differentiated.

Where the numbers lie in the files is the caller's business, and so is their truth: no checksum is looked at here.
"""

import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.peer import peer
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather
from mempar.memory.lookup import Readers

# Bytes of rows that a reader holds at a time: long prompts are looked up in parts.
PART_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class MappedBlock:
    """Rows and columns of a table, one row behind the other in a file.

    Attributes:
        path: the file.
        start: where in it they begin, in bytes.
        part: which rows and columns they are.
    """

    path: Path
    start: int
    part: TableSlice


class MappedTable:
    """A table `[S, D]` in any number of files, in any cut.

    Attributes:
        num_slots: S.
        value_dim: D.
        dtype: of its numbers.
    """

    def __init__(self, blocks: list[MappedBlock], dtype: torch.dtype) -> None:
        """Map the files.

        Args:
            blocks: what makes up the table, nothing of it twice.
            dtype: of its numbers.

        Raises:
            ValueError: when a block does not lie inside its file, or numbers not at multiples of their size.
            OSError: when a file cannot be opened or mapped.
        """
        self.num_slots, self.value_dim = blocks[0].part.num_slots, blocks[0].part.value_dim
        self.dtype = dtype
        files = {path: _map_file(path) for path in {block.path for block in blocks}}
        self._parts = [block.part for block in blocks]
        self._views = [_view(files[block.path], block, dtype) for block in blocks]
        self._starts = torch.tensor([part.row_start for part in self._parts])
        self._ends = torch.tensor([part.row_end for part in self._parts])

    def gather(self, slot_index: Tensor) -> Tensor:
        """Copy rows out of the files.

        Args:
            slot_index: `[U] int64`, ascending, on the CPU.

        Returns:
            `[U, D]`, on the CPU.
        """
        out = torch.empty(len(slot_index), self.value_dim, dtype=self.dtype)
        edges = (torch.searchsorted(slot_index, edge).tolist() for edge in (self._starts, self._ends))
        for part, view, first, end in zip(self._parts, self._views, *edges, strict=True):
            if first == end:
                continue
            rows = slot_index[first:end] - part.row_start
            if part.num_columns == self.value_dim:
                torch.index_select(view, 0, rows, out=out[first:end])
            else:
                out[first:end, part.column_start : part.column_end] = view.index_select(0, rows)
        return out


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """What some tokens read.

    Attributes:
        tokens: which tokens.
        slot_index: `[U] int64`, the distinct slots, ascending, on the CPU.
        row_index: `[T * M] int32`, places among these.
        offsets: `[T + 1] int32`, where each token's reads start.
    """

    tokens: slice
    slot_index: Tensor
    row_index: Tensor
    offsets: Tensor


class MappedReader:
    """Reads a mapped table; see `RowReader`. What `find` returns are the slots themselves, `[T, M] int64`."""

    def __init__(self, table: MappedTable, backend: Backend = TORCH) -> None:
        self.table, self.backend = table, backend

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """See `RowReader.find`."""
        return slot_index

    def read(self, found: Tensor, weight: Tensor) -> Tensor:
        """See `RowReader.read`."""
        weight = weight.to(self.table.dtype)
        sums = []
        for reads in _in_parts(found, self._token_bytes(found)):
            rows, weights = self._rows(reads, found.device), weight[reads.tokens].reshape(-1)
            sums.append(weighted_gather(rows, reads.row_index, weights, reads.offsets, backend=self.backend))
        return torch.cat(sums)

    def dot(self, found: Tensor, x: Tensor) -> Tensor:
        """See `RowReader.dot`."""
        x = x.to(self.table.dtype)
        products = []
        for reads in _in_parts(found, self._token_bytes(found)):
            bag_index = bag_of_entries(reads.offsets, len(reads.row_index))
            rows, part = self._rows(reads, found.device), x[reads.tokens].contiguous()
            products.append(gather_scores(rows, reads.row_index, bag_index, part, backend=self.backend))
        return torch.cat(products).view(found.shape)

    def experts(self, down: "MappedReader", found: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """See `Readers.read_experts`; this table holds the rows that are summed."""
        x, weight = x.to(self.table.dtype), weight.to(torch.promote_types(self.table.dtype, torch.float32))
        sums = []
        for reads in _in_parts(found, 2 * self._token_bytes(found)):
            rows, down_rows = self._rows(reads, found.device), down._rows(reads, found.device)
            weights, part = weight[reads.tokens].reshape(-1), x[reads.tokens].contiguous()
            out, _ = peer(down_rows, rows, reads.row_index, weights, reads.offsets, part, backend=self.backend)
            sums.append(out)
        return torch.cat(sums)

    def _rows(self, reads: _Reads, device: torch.device) -> Tensor:
        return self.table.gather(reads.slot_index).to(device)

    def _token_bytes(self, found: Tensor) -> int:
        """Bytes of the rows of a token, if no other token reads them."""
        return found.shape[1] * self.table.value_dim * self.table.dtype.itemsize


class MappedReaders(Readers):
    """Mapped tables that a memory layer reads."""

    def read_experts(self, found: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """See `Readers`: one operation, as where both tables lie in memory whole."""
        values, down = self.values, self.down
        assert isinstance(values, MappedReader) and isinstance(down, MappedReader)
        return values.experts(down, found, weight, x)


def _in_parts(slot_index: Tensor, token_bytes: int) -> Iterator[_Reads]:
    """Cut the reads of tokens, `[T, M] int64`, into parts of at most `PART_BYTES` of rows; there is one at least."""
    num_tokens, num_reads = slot_index.shape
    at_once = max(1, PART_BYTES // token_bytes)
    for first in range(0, max(1, num_tokens), at_once):
        tokens = slice(first, min(num_tokens, first + at_once))
        # Reads of a row by several tokens or heads are one.
        distinct, place = torch.unique(slot_index[tokens], return_inverse=True)
        ends = (tokens.stop - first) * num_reads
        yield _Reads(
            tokens=tokens,
            slot_index=distinct.cpu(),
            row_index=place.reshape(-1).int(),
            offsets=torch.arange(0, ends + 1, num_reads, dtype=torch.int32, device=slot_index.device),
        )


def _map_file(path: Path) -> Tensor:
    """The bytes of a file, `[bytes] uint8`, which nobody may write to."""
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Rows are far apart: what the kernel would read ahead is not asked for.
        buffer.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        # That writing would be undefined; nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _view(file: Tensor, block: MappedBlock, dtype: torch.dtype) -> Tensor:
    part = block.part
    end = block.start + part.num_rows * part.num_columns * dtype.itemsize
    # Reading beyond the end of a file ends the process.
    if end > len(file):
        raise ValueError(f"{block.path} has {len(file)} bytes, and {end} are read")
    if block.start % dtype.itemsize:
        raise ValueError(f"numbers of {dtype} begin at byte {block.start} of {block.path}")
    return file[block.start : end].view(dtype).view(part.num_rows, part.num_columns)
