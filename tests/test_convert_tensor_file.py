"""Files of one tensor, as torch.save writes them, in parts."""

import os
import pickle
import random
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.block_writer import as_bytes
from mempar.tools.convert.deepspeed.crc import combined
from mempar.tools.convert.deepspeed.tensor_file import TensorFile, load_object, open_tensor_file

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
SHAPES = ((5, 7), (1,), (), (3, 1, 2, 5), (0, 4), (64, 1001))


def numbers_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 255, shape).to(dtype)


def write(path: Path, numbers: Tensor, **extras: int) -> TensorFile:
    """Write a file back to front."""
    file = TensorFile(dtype=str(numbers.dtype).removeprefix("torch."), shape=tuple(numbers.shape), extras=extras)
    data = bytes(as_bytes(numbers))
    crc = zlib.crc32(data)
    with path.open("wb") as stream:
        for start, content in (
            (file.start + len(data), file.tail(crc)),
            (file.start, data),
            (0, file.head(crc)),
        ):
            stream.seek(start)
            stream.write(content)
    assert path.stat().st_size == file.file_bytes
    return file


def test_crcs_of_parts_make_that_of_the_whole(fresh_seed: int) -> None:
    data = random.Random(fresh_seed).randbytes(10_001)
    cuts = sorted(random.Random(fresh_seed).choices(range(len(data) + 1), k=9))
    parts = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert combined((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(data)
    assert combined([]) == zlib.crc32(b"")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_is_written(dtype: torch.dtype, mapped: bool, tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        numbers = numbers_of(shape, dtype)
        path = tmp_path / f"{number}.pt"
        file = write(path, numbers, cat_dim=1, param_n_sub_params=2)
        loaded = torch.load(path, mmap=mapped, weights_only=True)
        assert loaded.keys() == {"cat_dim", "param_n_sub_params", "param"} and loaded["cat_dim"] == 1
        assert loaded["param"].dtype == dtype and torch.equal(loaded["param"], numbers)
        assert loaded["param"].is_contiguous()
        # Anything that knows archives finds nothing wrong with it.
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        # A mapped tensor is aligned as its numbers are.
        assert file.start % 64 == 0
        stored = open_tensor_file(path, file.dtype, file.shape)
        assert (stored.start, stored.record_bytes) == (file.start, file.num_bytes)


def test_it_describes_a_tensor_in_torchs_own_words(tmp_path: Path) -> None:
    numbers = torch.randn(6, 11)
    write(tmp_path / "ours.pt", numbers, cat_dim=0)
    torch.save({"cat_dim": 0, "param": numbers}, tmp_path / "archive.pt")
    with zipfile.ZipFile(tmp_path / "ours.pt") as ours, zipfile.ZipFile(tmp_path / "archive.pt") as theirs:
        for name in ours.namelist():
            assert ours.read(name) == theirs.read(name), name
        assert set(theirs.namelist()) - set(ours.namelist()) == {"archive/.data/serialization_id"}


def test_what_torch_saved_is_found_in_its_place(tmp_path: Path) -> None:
    numbers = torch.randn(6, 11)
    for content in ({"param": numbers}, numbers, numbers.flatten(), {"param": numbers[:5]}):
        torch.save(content, tmp_path / "saved.pt")
        wanted = numbers[:5] if isinstance(content, dict) and len(content["param"]) == 5 else numbers
        stored = open_tensor_file(tmp_path / "saved.pt", "float32", tuple(wanted.shape))
        data = (tmp_path / "saved.pt").read_bytes()[stored.start :][: stored.record_bytes]
        assert data[: wanted.numel() * 4] == bytes(as_bytes(wanted.contiguous()))
        assert stored.crc == zlib.crc32(data)


def test_torch_reads_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    # A hole in the file stands for zeros, whose checksum follows from that of a few.
    rows, columns = (1 << 20) + 3, 1024
    file = TensorFile(dtype="float32", shape=(rows, columns), extras={})
    assert file.num_bytes > 1 << 32
    last = torch.randn(columns)
    zeros, data = bytes(1 << 22), bytes(as_bytes(last))
    blocks, rest = divmod(4 * columns * (rows - 1), len(zeros))
    known = zlib.crc32(zeros)
    parts = [(known, len(zeros))] * blocks + [(zlib.crc32(zeros[:rest]), rest), (zlib.crc32(data), len(data))]
    crc = combined(parts)
    path = tmp_path / "large.pt"
    with path.open("wb") as stream:
        for start, content in (
            (0, file.head(crc)),
            (file.start + file.num_bytes - len(data), data),
            (file.start + file.num_bytes, file.tail(crc)),
        ):
            stream.seek(start)
            stream.write(content)
    assert path.stat().st_size == file.file_bytes
    loaded = torch.load(path, mmap=True, weights_only=True)["param"]
    assert loaded.shape == (rows, columns)
    assert torch.equal(loaded[-1], last) and not loaded[-2].any() and not loaded[0].any()
    stored = open_tensor_file(path, "float32", (rows, columns))
    assert (stored.start, stored.record_bytes, stored.crc) == (file.start, file.num_bytes, crc)
    assert path.stat().st_blocks * 512 < 1 << 20


class Opens:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_tensors_are_refused_and_not_run(tmp_path: Path) -> None:
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    numbers = torch.randn(6, 11)

    def packed() -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(1))
            archive.writestr("archive/data/0", bytes(6 * 11 * 4))
            archive.writestr("archive/version", b"3\n")

    cases = {
        "executes": lambda: torch.save({"param": Opens(trap)}, path),
        "two": lambda: torch.save({"param": numbers, "other": numbers.clone()}, path),
        "other shape": lambda: torch.save({"param": numbers.t().contiguous()}, path),
        "other dtype": lambda: torch.save({"param": numbers.double()}, path),
        "transposed": lambda: torch.save({"param": numbers.reshape(11, 6).t()}, path),
        "none": lambda: torch.save({"weights": numbers}, path),
        "packed": packed,
        "text": lambda: path.write_text("hello"),
        "empty": lambda: path.write_bytes(b""),
        "missing": lambda: None,
        "folder": path.mkdir,
        "link": lambda: (torch.save({"param": numbers}, tmp_path / "there.pt"), path.symlink_to(tmp_path / "there.pt")),
    }
    for name, make in cases.items():
        make()
        with pytest.raises(CheckpointError, match=r"bad\.pt is damaged: .+; a universal .+; restore"):
            open_tensor_file(path, "float32", (6, 11))
        assert not trap.exists(), name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def test_files_cut_short_anywhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    write(path, torch.randn(6, 11))
    data = path.read_bytes()
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt is damaged"):
            open_tensor_file(path, "float32", (6, 11))


def test_small_objects_are_loaded_and_large_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "step.pt"
    for step in (3, 3.0, torch.tensor(3.0)):
        torch.save(step, path)
        assert load_object(path) == 3
    torch.save(torch.zeros(1 << 19), path)
    with pytest.raises(CheckpointError, match="more than"):
        load_object(path)
    torch.save(Opens(tmp_path / "trap"), path)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_object(path)
    assert not (tmp_path / "trap").exists()
