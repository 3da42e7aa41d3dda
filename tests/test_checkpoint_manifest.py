"""manifest.json: sealed, complete, and nothing that it says leads out of its directory (laws 6 and 7)."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import CheckpointError, DamagedError, UnreadableError
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import (
    WEIGHTS,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    _seal,
    checksum,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    """A checkpoint of one tensor in two files."""
    contents = {"tables/x/one": b"h" * 3 + bytes(16), "two": bytes(range(8))}
    box = Box(name="x", dtype="float32", shape=(3, 2), offset=(0, 0), sizes=(2, 2))
    last = Box(name="x", dtype="float32", shape=(3, 2), offset=(2, 0), sizes=(1, 2))
    pieces = {
        "tables/x/one": (
            Piece(start=0, num_bytes=3, checksum=checksum(b"hhh")),
            Piece(start=3, num_bytes=16, checksum=checksum(bytes(16)), box=box),
        ),
        "two": (Piece(start=0, num_bytes=8, checksum=checksum(bytes(range(8))), box=last),),
    }
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    manifest = Manifest(
        root=tmp_path,
        progress={"step": 7, "applied_steps": 7, "losses": [[1, 2.5]]},
        about={"layout": {"tp": 2}},
        tensors={"x": TensorRecord(dtype="float32", shape=(3, 2), kind=WEIGHTS, digest=2**64 - 3)},
        files={path: FileRecord(path=path, pieces=of_file) for path, of_file in pieces.items()},
    )
    (tmp_path / "manifest.json").write_bytes(write_manifest(manifest))
    return manifest


def rewrite(root: Path, change: Any) -> None:
    """Change what a manifest says and seal it anew, as somebody who means harm would."""
    body = json.loads((root / "manifest.json").read_bytes())
    del body["checksum"]
    change(body)
    (root / "manifest.json").write_bytes(_seal(json.dumps(body)))


def test_manifest_reads_as_it_was_written(written: Manifest) -> None:
    found = read_manifest(written.root)
    assert found == written
    assert (found.step, found.num_bytes) == (7, 27)
    assert [path for path, _ in found.pieces_of("x")] == ["tables/x/one", "two"]
    assert found.pieces_of("y") == []
    # Any JSON reader can look at it.
    assert json.loads((written.root / "manifest.json").read_bytes())["layout"] == {"tp": 2}


def test_every_flipped_bit_of_the_manifest_is_found(written: Manifest) -> None:
    path = written.root / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read_manifest(written.root)
    for length in (0, 1, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read_manifest(written.root)
    path.write_bytes(content + b"\n")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(written.root)


def test_files_that_are_missing_cut_or_no_files_are_named(written: Manifest, tmp_path: Path) -> None:
    one = written.root / "tables/x/one"
    content = one.read_bytes()
    one.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"tables/x/one is damaged: it has 18 bytes where 19 were written"):
        read_manifest(written.root)
    one.unlink()
    with pytest.raises(CheckpointError, match=r"tables/x/one is damaged: it is missing"):
        read_manifest(written.root)
    one.mkdir()
    with pytest.raises(CheckpointError, match=r"tables/x/one is damaged: it is not a plain file"):
        read_manifest(written.root)
    one.rmdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_bytes(content)
    one.symlink_to(outside)
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_manifest(written.root)
    one.unlink()
    one.write_bytes(content)
    os.rename(written.root / "tables", outside.with_suffix(".tables"))
    (written.root / "tables").symlink_to(outside.with_suffix(".tables"))
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_manifest(written.root)


WRONG_PATHS = ("/etc/passwd", "../two", "tables/../../two", "./two", "tables//x", "", "two\0", "tables/x/one/")


@pytest.mark.parametrize("path", [*WRONG_PATHS, "\x1b[2J", "two\n", "\ud800"])
def test_paths_that_leave_the_directory_are_refused(written: Manifest, path: str) -> None:
    rewrite(written.root, lambda body: body["files"].update({path: body["files"].pop("two")}))
    with pytest.raises(CheckpointError, match="which is no path inside the checkpoint"):
        read_manifest(written.root)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("tensors"),
        lambda body: body.update(files=[]),
        lambda body: body["files"].update(two=[[8, "00", "x", [3, 0], [1, 2]]]),
        lambda body: body["files"].update(two=[[8, "00", "x", [2, 0], [-1, 2]]]),
        lambda body: body["files"].update(two=[[8, "00", "x", [2], [1]]]),
        lambda body: body["files"].update(two=[[8, "00", "y", [2, 0], [1, 2]]]),
        lambda body: body["files"].update(two=[[-8, "00"]]),
        lambda body: body["files"].update(two=[[8.0, "00"]]),
        lambda body: body["tensors"]["x"].update(shape=[True, 2]),
        lambda body: body["tensors"]["x"].update(digest="none"),
        lambda body: body["files"].update(two=[[8, "00", "x", [0, 0], [1, 2]]]),
        lambda body: body["files"].update({"tables/x/one": [[19, "00"]]}),
        lambda body: body["tensors"].update({"x\x1b[2J": body["tensors"].pop("x")}),
        lambda body: body.update(data=[1]),
        lambda body: body["progress"].update(samples=-5),
        lambda body: body["tensors"].update({"memory./../../../escaped": {}}),
        lambda body: next(iter(body["tensors"].values())).update(dtype="load"),
        lambda body: next(iter(body["tensors"].values())).update(kind="things"),
        lambda body: body["progress"].update(losses="abc"),
        lambda body: body["progress"].pop("applied_steps"),
        lambda body: body["progress"].update(step="7"),
        lambda body: body["progress"].pop("step"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(written: Manifest, change: Any) -> None:
    rewrite(written.root, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it does not describe a checkpoint"):
        read_manifest(written.root)


def test_other_formats_and_other_directories_are_refused(written: Manifest, tmp_path: Path) -> None:
    rewrite(written.root, lambda body: body.update(format=9))
    with pytest.raises(CheckpointError, match="has another format than 3"):
        read_manifest(written.root)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        read_manifest(tmp_path / "tables")


def test_manifests_that_are_no_plain_files_are_not_read(written: Manifest) -> None:
    path = written.root / "manifest.json"
    path.unlink()
    for make in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path), lambda: write_hole(path, 1 << 41)):
        make()
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it is no plain file of at most"):
            read_manifest(written.root)
        path.unlink()
    path.write_bytes(_seal('{"format": 3, "tensors": ' + "[" * 100_000 + "]" * 100_000 + "}"))
    with pytest.raises(CheckpointError, match=r"it does not describe a checkpoint \(RecursionError"):
        read_manifest(written.root)


def write_hole(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(num_bytes)


@pytest.mark.parametrize("name", ["manifest.json", "two"])
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, UnreadableError), (errno.EACCES, UnreadableError), (errno.ENOENT, None)]
)
def test_what_may_be_read_another_time_is_not_called_damaged(
    written: Manifest, monkeypatch: pytest.MonkeyPatch, name: str, number: int, expected: type[CheckpointError] | None
) -> None:
    """A run goes on from an older checkpoint where one is damaged: not where a disk or a network has hiccups."""
    stat = Path.lstat if name == "manifest.json" else Path.stat

    def fail(path: Path, **given: Any) -> os.stat_result:
        # `is_symlink` asks first.
        if path.name == name and given.get("follow_symlinks", True):
            raise OSError(number, os.strerror(number))
        return stat(path, **given)

    monkeypatch.setattr(Path, stat.__name__, fail)
    with pytest.raises(CheckpointError) as told:
        read_manifest(written.root)
    assert isinstance(told.value, UnreadableError) == (expected is UnreadableError)
    if expected is UnreadableError:
        assert not isinstance(told.value, DamagedError) and told.value.exit_status == 1
        assert "try again" in str(told.value)
