"""Tables that stay in their files: the same as tables in memory, sums of rows bit for bit, in any cut."""

import itertools
from pathlib import Path

import pytest
import torch

from mempar.dims import TableSlice
from mempar.memory import mapped
from mempar.memory.lookup import LocalReader, Readers
from mempar.memory.mapped import MappedBlock, MappedReader, MappedReaders, MappedTable
from mempar.memory.values import ValueShard

SLOTS, WIDTH = 37, 11
CUTS = {
    "whole": ([0, 37], [0, 11]),
    "rows": ([0, 5, 6, 37], [0, 11]),
    "columns": ([0, 37], [0, 3, 11]),
    "grid": ([0, 20, 37], [0, 4, 8, 11]),
}


def part_of(rows: tuple[int, int], columns: tuple[int, int]) -> TableSlice:
    return TableSlice(
        num_slots=SLOTS,
        value_dim=WIDTH,
        row_start=rows[0],
        row_end=rows[1],
        column_start=columns[0],
        column_end=columns[1],
    )


def local_reader(number: int, dtype: torch.dtype) -> LocalReader:
    whole = part_of((0, SLOTS), (0, WIDTH))
    return LocalReader(ValueShard(whole, seed=3, number=number, dtype=dtype, device=torch.device("cpu")))


def mapped_reader(reader: LocalReader, folder: Path, cut: str) -> MappedReader:
    """The same table in files, the last block first, each behind a header of its own length."""
    values, blocks = reader.shard.values, []
    row_cuts, column_cuts = CUTS[cut]
    for rows in itertools.pairwise(row_cuts):
        for columns in itertools.pairwise(column_cuts):
            block = values[slice(*rows), slice(*columns)].contiguous()
            path = folder / f"{rows}-{columns}-{len(list(folder.iterdir()))}"
            start = 8 * len(blocks)
            path.write_bytes(b"\xff" * start + block.view(torch.uint8).numpy().tobytes() + b"\xff" * 3)
            blocks.append(MappedBlock(path=path, start=start, part=part_of(rows, columns)))
    return MappedReader(MappedTable(blocks[::-1], values.dtype))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_are_those_of_the_table_in_memory(
    cut: str, dtype: torch.dtype, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    locals_ = [local_reader(number, dtype) for number in range(2)]
    readers = [mapped_reader(reader, tmp_path, cut) for reader in locals_]
    # Three tokens at a time.
    monkeypatch.setattr(mapped, "PART_BYTES", 3 * 5 * WIDTH * dtype.itemsize)
    for num_tokens in (1, 8, 0):
        slots = torch.randint(SLOTS, (num_tokens, 5))
        slots[:1] = 4
        weight, x = torch.rand(num_tokens, 5), torch.randn(num_tokens, WIDTH)
        found = [reader.find(slots) for reader in (locals_[0], readers[0])]
        assert torch.equal(readers[0].read(found[1], weight), locals_[0].read(found[0], weight))
        torch.testing.assert_close(readers[0].dot(found[1], x), locals_[0].dot(found[0], x))
        expected = Readers(values=locals_[0], down=locals_[1]).read_experts(found[0], weight, x)
        experts = MappedReaders(values=readers[0], down=readers[1]).read_experts(found[1], weight, x)
        # How torch adds up a product depends on how the row lies in memory.
        torch.testing.assert_close(experts, expected)


def test_blocks_that_leave_their_file_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(bytes(4 * SLOTS * WIDTH + 8))
    whole = part_of((0, SLOTS), (0, WIDTH))
    for start, why in ((12, "1640 are read"), (6, r"begin at byte 6")):
        with pytest.raises(ValueError, match=why):
            MappedTable([MappedBlock(path=tmp_path / "rows", start=start, part=whole)], torch.float32)
