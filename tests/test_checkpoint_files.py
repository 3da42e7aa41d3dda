"""Files of a checkpoint by themselves: read by safetensors and by torch, in any cut, hostile ones refused."""

import io
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mempar.errors import CheckpointError
from mempar.memory.digest import digest, digest_box
from mempar.runtime.checkpoint import shard_file, torch_dist
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import WEIGHTS, FileRecord, Manifest, Piece, TensorRecord, checksum
from mempar.runtime.checkpoint.names import canonical, stored_name
from mempar.runtime.checkpoint.reading import Reader

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 250, shape).to(dtype)


def box_of(whole: Tensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    name = str(whole.dtype).removeprefix("torch.")
    return Box(name="x.y", dtype=name, shape=tuple(whole.shape), offset=offset, sizes=sizes)


def part(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(slice(at, at + size) for at, size in zip(box.offset, box.sizes, strict=True))]


def manifest_of(root: Path, whole: Tensor, files: list[FileRecord]) -> Manifest:
    record = TensorRecord(
        dtype=str(whole.dtype).removeprefix("torch."), shape=tuple(whole.shape), kind=WEIGHTS, digest=0
    )
    return Manifest(
        root=root,
        progress={"step": 1},
        about={},
        tensors={"x.y": record},
        files={file.path: file for file in files},
    )


def write_shards(root: Path, whole: Tensor, boxes: list[Box], block_rows: int) -> tuple[Manifest, int]:
    written = [shard_file.write_shard_file(root, box, part(whole, box), block_rows, map) for box in boxes]
    return manifest_of(root, whole, [record for record, _ in written]), sum(found for _, found in written) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_are_safetensors_and_read_in_any_cut(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = numbers((23, 10), dtype)
    boxes = [box_of(whole, (0, 0), (9, 7)), box_of(whole, (9, 0), (14, 7)), box_of(whole, (0, 7), (23, 3))]
    manifest, found = write_shards(tmp_path, whole, boxes, 4)
    assert found == int(digest("x.y", whole)) % 2**64
    for box in boxes:
        (name, tensor), *rest = safetensors.torch.load_file(tmp_path / shard_file.path_of(box)).items()
        assert not rest
        assert name == "x.y"
        assert torch.equal(tensor, part(whole, box))
        record = manifest.files[shard_file.path_of(box)]
        content = (tmp_path / record.path).read_bytes()
        assert record.num_bytes == len(content)
        assert record.pieces[1].start % 64 == 0
        for piece in record.pieces:
            assert piece.checksum == checksum(content[piece.start : piece.start + piece.num_bytes])
    for offset, sizes in (((0, 0), (23, 10)), ((8, 0), (4, 7)), ((3, 5), (20, 4)), ((22, 9), (1, 1))):
        wanted = box_of(whole, offset, sizes)
        for target in (torch.empty(sizes, dtype=dtype), torch.empty((*sizes, 2), dtype=dtype)[..., 0]):
            Reader(manifest).read(wanted, target)
            assert torch.equal(target, part(whole, wanted))


def test_a_rank_reads_no_more_than_the_blocks_that_it_needs(tmp_path: Path) -> None:
    whole = numbers((64, 8), torch.float32)
    manifest, _ = write_shards(tmp_path, whole, [box_of(whole, (0, 0), (40, 8)), box_of(whole, (40, 0), (24, 8))], 8)
    # The same rows as were written, then rows that begin inside a block.
    for offset, sizes, blocks in (((0, 0), (40, 8), 5), ((30, 0), (14, 8), 3), ((40, 2), (8, 1), 1)):
        reader = Reader(manifest)
        reader.read(box_of(whole, offset, sizes), torch.empty(sizes))
        assert reader.bytes_read == blocks * 8 * 8 * 4


def test_rows_alone_have_a_history(tmp_path: Path) -> None:
    whole = numbers((11,), torch.int32)
    manifest, found = write_shards(tmp_path, whole, [box_of(whole, (0,), (6,)), box_of(whole, (6,), (5,))], 3)
    target = torch.empty(7, dtype=torch.int32)
    Reader(manifest).read(box_of(whole, (2,), (7,)), target)
    assert torch.equal(target, whole[2:9])
    assert found == int(digest("x.y", whole)) % 2**64


def write_dense(root: Path, whole: Tensor, boxes: list[Box], block_bytes: int) -> tuple[Manifest, int]:
    files, total = [], 0
    for rank, box in enumerate(boxes):
        record, digests = torch_dist.write_rank_file(root, rank, [(box, part(whole, box))], {}, block_bytes)
        assert record is not None
        files.append(record)
        total += digests["x.y"]
    return manifest_of(root, whole, files), total % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_files_are_read_in_any_cut(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = numbers((3, 12, 5), dtype)
    boxes = [
        box_of(whole, (0, 0, 0), (1, 12, 5)),
        box_of(whole, (1, 0, 0), (2, 7, 5)),
        box_of(whole, (1, 7, 0), (2, 5, 5)),
    ]
    manifest, found = write_dense(tmp_path, whole, boxes, 64)
    assert found == int(digest_box("x.y", whole, (0, 0, 0), (3, 12, 5))) % 2**64
    assert max(len(record.pieces) for record in manifest.files.values()) > 1
    for offset, sizes in (((0, 0, 0), (3, 12, 5)), ((1, 5, 2), (2, 4, 2))):
        wanted, target = box_of(whole, offset, sizes), torch.empty(sizes, dtype=dtype)
        Reader(manifest).read(wanted, target)
        assert torch.equal(target, part(whole, wanted))


def deflated(archive: io.BytesIO) -> io.BytesIO:
    """The same archive with records that are longer than they look."""
    packed = io.BytesIO()
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry))
    return packed


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "form", ["pickle", "torch.save", "list", "sparse", "parameter", "other-shape", "other-dtype", "deflated", "empty"]
)
def test_hostile_pieces_are_refused_and_not_executed(form: str, tmp_path: Path) -> None:
    whole = numbers((4, 2), torch.float32)
    mark = tmp_path / "executed"
    content = io.BytesIO()
    if form == "pickle":
        content.write(pickle.dumps(Bomb(mark)))
    elif form != "empty":
        things = {
            "torch.save": Bomb(mark),
            "list": [whole],
            "sparse": whole.to_sparse(),
            "parameter": torch.nn.Parameter(whole),
            "deflated": whole,
            "other-shape": whole[:3].clone(),
            "other-dtype": whole.double(),
        }
        torch.save(things[form], content)
    if form == "deflated":
        content = deflated(content)
    if form in ("pickle", "empty"):
        content.write(bytes(64))
    (tmp_path / torch_dist.DIRECTORY).mkdir()
    record = torch_dist.write_small_file(tmp_path, torch_dist.path_of(0), content.getvalue())
    pieces = (replace(record.pieces[0], box=box_of(whole, (0, 0), (4, 2))),)
    manifest = manifest_of(tmp_path, whole, [replace(record, pieces=pieces)])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: x\.y, rows 0 to 4"):
        Reader(manifest).read(box_of(whole, (0, 0), (4, 2)), torch.empty(4, 2))
    assert not mark.exists()
    # The bomb is one.
    if form == "pickle":
        pickle.loads(content.getvalue())
        assert mark.exists()


def test_what_is_missing_or_other_is_named(tmp_path: Path) -> None:
    whole = numbers((8, 2), torch.float32)
    manifest, _ = write_shards(tmp_path, whole, [box_of(whole, (0, 0), (5, 2))], 4)
    with pytest.raises(CheckpointError, match=r"6 elements of x\.y are in none of its files"):
        Reader(manifest).read(box_of(whole, (0, 0), (8, 2)), torch.empty(8, 2))
    for other in (
        replace(box_of(whole, (0, 0), (1, 1)), name="y"),
        replace(box_of(whole, (0, 0), (1, 1)), shape=(9, 2)),
        replace(box_of(whole, (0, 0), (1, 1)), dtype="bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=r"does not hold .* a run of the same model and precision"):
            Reader(manifest).read(other, torch.empty(1, 1))


def test_names_of_both_optimizers_stand_for_each_other() -> None:
    plain, distributed = "optimizer.state.fp32_param.w", "optimizer.state.param.w"
    assert canonical(plain) == canonical(distributed) == distributed
    assert canonical("optimizer.state.exp_avg.w") == "optimizer.state.exp_avg.w"
    assert stored_name(plain, {distributed, "w"}) == distributed
    assert stored_name(distributed, {plain, "w"}) == plain
    # In float32 the plain optimizer steps the parameter itself.
    assert stored_name(distributed, {"w"}) == "w"
    assert stored_name("optimizer.state.exp_avg.w", {"w"}) == "optimizer.state.exp_avg.w"


def test_a_piece_that_claims_more_bytes_than_its_numbers_take_gets_no_room(tmp_path: Path) -> None:
    whole = numbers((4, 2), torch.float32)
    for name in (torch_dist.path_of(0), "tables/x.y/rows.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            # A hole: nothing on disk.
            file.truncate(1 << 41)
        piece = Piece(start=0, num_bytes=1 << 41, checksum="0", box=box_of(whole, (0, 0), (4, 2)))
        manifest = manifest_of(tmp_path, whole, [FileRecord(path=name, pieces=(piece,))])
        with pytest.raises(CheckpointError, match="not the 32 that its numbers take"):
            Reader(manifest).read(box_of(whole, (0, 0), (4, 2)), torch.empty(4, 2))
