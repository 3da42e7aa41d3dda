"""Blocks past the page cache: the same bytes wherever they lie, whatever the file system thinks of it."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mempar.runtime.checkpoint import block_writer
from mempar.runtime.checkpoint.block_writer import ALIGNMENT, BlockWriter, aligned_empty


def numbers(num_bytes: int) -> torch.Tensor:
    return aligned_empty(num_bytes).copy_(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8))


def test_room_begins_at_a_page() -> None:
    for num_bytes in (0, 1, ALIGNMENT, 3 * ALIGNMENT + 5):
        room = aligned_empty(num_bytes)
        assert len(room) == num_bytes and room.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("refused", ["never", "when opened", "when written"])
def test_blocks_lie_where_they_belong(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed, pwrite = os.open, os.close, os.pwrite
    direct: set[int] = set()

    def open_or_not(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refused == "when opened":
            raise OSError(errno.EINVAL, "no such thing here")
        file = opened(path, flags, mode)
        if flags & os.O_DIRECT:
            direct.add(file)
        return file

    def close(file: int) -> None:
        direct.discard(file)
        closed(file)

    used: list[int] = []

    def write_or_not(file: int, data: memoryview, start: int) -> int:
        if file in direct:
            used.append(len(data))
            if refused == "when written":
                raise OSError(errno.EINVAL, "not so")
        return pwrite(file, data, start)

    monkeypatch.setattr(block_writer.os, "open", open_or_not)
    monkeypatch.setattr(block_writer.os, "close", close)
    monkeypatch.setattr(block_writer.os, "pwrite", write_or_not)
    path = tmp_path / "file"
    # Blocks in any order, aligned ones and others beside each other, and a tail.
    cuts = [0, 100, ALIGNMENT, 3 * ALIGNMENT, 3 * ALIGNMENT + 7, 5 * ALIGNMENT, 7 * ALIGNMENT, 7 * ALIGNMENT + 9]
    whole = numbers(cuts[-1])
    path.write_bytes(b"")
    os.truncate(path, cuts[-1])
    writer = BlockWriter(path)
    try:
        for place in (5, 0, 2, 6, 1, 4, 3):
            block = numbers(cuts[place + 1] - cuts[place]).copy_(whole[cuts[place] : cuts[place + 1]])
            writer.write(block, cuts[place])
        # Memory that is not aligned goes another way to the same place.
        writer.write(whole[ALIGNMENT : 3 * ALIGNMENT].clone().roll(0), ALIGNMENT)
        writer.sync()
    finally:
        writer.close()
    assert path.read_bytes() == bytes(whole.numpy())
    if refused == "when opened":
        assert used == []


def test_other_failures_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockWriter(tmp_path / "nothing")
