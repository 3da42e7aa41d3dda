"""Checkpoints against damage, full and read-only disks, and ranks that fail: one message, nothing lost (law 7)."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mempar.errors import CheckpointError, MemparError
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint import describing, saving, shard_file, torch_dist
from mempar.runtime.checkpoint.boxes import check_coverage
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.manifest import read_manifest
from mempar.runtime.checkpoint.parts import Parts
from mempar.runtime.checkpoint.retention import checkpoints_in, discard, prune, replace_directory
from mempar.runtime.checkpoint.together import do_together
from mempar.runtime.config import RunConfig
from mempar.tools import verify
from rank_pool import RankPool
from toy import Session, toy_run
from toy_checkpoints import load_into, save_checkpoint

PROGRESS = {"step": 2, "applied_steps": 2}
# Of the flipped bytes that are drawn from all files.
NUM_FLIPS = 40


def small(**sizes: Any) -> RunConfig:
    run = toy_run(memory={"usage_interval": 1}, **sizes)
    return replace(run, checkpoint=CheckpointConfig(block_bytes=2000))


def save_step(run: RunConfig, path: Path) -> None:
    """Train one step and save."""
    session = Session(run)
    session.step(0)
    save_checkpoint(path, run, session, PROGRESS)
    tear_down(session.world)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks."""
    path = tmp_path_factory.mktemp("saved") / "step_00000002"
    pool.run(4, save_step, small(tp=2, mp=4, mp_rows=2), path)
    return path


def sampled_flips(checkpoint: Path, draw: random.Random) -> list[tuple[str, int]]:
    """Files and places in them: first bytes, last ones and others, headers included."""
    flips = []
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        size = path.stat().st_size
        places = {0, size - 1, min(size - 1, 70), draw.randrange(size), draw.randrange(size)}
        flips += [(str(path.relative_to(checkpoint)), place) for place in sorted(places)]
    return draw.sample(flips, NUM_FLIPS)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def try_flips(run: RunConfig, checkpoint: Path, flips: list[tuple[str, int]]) -> list[str]:
    """Load with one flipped byte after the other; returns what was said, or nothing where nothing was found."""
    session = Session(run)
    said = []
    for name, place in flips:
        if session.world.is_main:
            flip(checkpoint / name, place)
        dist.barrier()
        try:
            load_into(session, checkpoint)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
        dist.barrier()
        if session.world.is_main:
            flip(checkpoint / name, place)
        dist.barrier()
    load_into(session, checkpoint)
    tear_down(session.world)
    return said


@pytest.mark.parametrize(("world_size", "sizes"), [(4, {"tp": 2, "mp": 4, "mp_rows": 2}), (1, {})], ids=["same", "one"])
def test_a_flipped_byte_anywhere_is_found_when_loading(
    world_size: int, sizes: dict[str, Any], saved: Path, pool: RankPool, rng: random.Random, tmp_path: Path
) -> None:
    # A table is not asked for its history here: what no rank reads is checked as well.
    run = replace(small(**sizes), memory=replace(small().memory, usage_interval=0))
    copy = shutil.copytree(saved, tmp_path / saved.name)
    flips = sampled_flips(copy, rng)
    for said in pool.run(world_size, try_flips, run, copy, flips):
        for (name, place), message in zip(flips, said, strict=True):
            assert f"{name} is damaged" in message, f"byte {place} of {name}: {message}"


def test_a_flipped_byte_anywhere_is_named_by_verify(saved: Path, rng: random.Random, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / saved.name)
    manifest = read_manifest(copy)
    for name, place in sampled_flips(copy, rng):
        flip(copy / name, place)
        with pytest.raises(verify.VerifyError) as found:
            verify.verify(copy, None, print)
        assert found.value.exit_status == 1
        assert f"{name} is damaged" in str(found.value)
        record = manifest.files.get(name)
        hit = (
            [piece.box for piece in record.pieces if piece.start <= place < piece.start + piece.num_bytes]
            if record
            else []
        )
        if hit and hit[0] is not None:
            assert f"{hit[0].name}, rows {hit[0].offset[0]} to" in str(found.value)
        flip(copy / name, place)
    verify.verify(copy, None, print)


def failing_rank(run: RunConfig, path: Path, after_files: int) -> str:
    """Save, while rank 1's disk fails after some files."""
    session = Session(run)
    write, count = shard_file.write_shard_file, 0

    def write_or_fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if session.world.rank == 1 and count > after_files:
            raise OSError(28, os.strerror(28))
        return write(*args)

    saving.shard_file.write_shard_file = write_or_fail
    try:
        save_checkpoint(path, run, session, PROGRESS)
    except MemparError as error:
        return str(error)
    finally:
        saving.shard_file.write_shard_file = write
        tear_down(session.world)
    return ""


def test_a_rank_that_cannot_write_ends_the_save_on_all(saved: Path, pool: RankPool, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "step_00000001")
    path = tmp_path / "step_00000002"
    for after_files in (0, 2):
        for said in pool.run(4, failing_rank, small(tp=2, mp=4, mp_rows=2), path, after_files):
            assert "step_00000002 cannot be written: rank 1: [Errno 28] No space left on device" in said
        # Nothing of it is left, what was there still is.
        assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
        verify.verify(tmp_path / "step_00000001", None, print)


def failing_phase(run: RunConfig, path: Path, phase: str) -> str:
    """Save, while one rank fails with an error that nobody expects; returns what this rank was told."""
    session = Session(run)
    owner, name, rank = {
        "collecting": (saving, "collect_parts", 1),
        "copying": (Parts, "copied", 1),
        "writing": (torch_dist, "write_rank_file", 1),
        "describing": (describing, "_versions", 0),
    }[phase]
    function = getattr(owner, name)

    def fail(*given: Any, **named: Any) -> Any:
        if session.world.rank == rank:
            raise KeyError(phase)
        return function(*given, **named)

    setattr(owner, name, fail)
    try:
        save_checkpoint(path, run, session, PROGRESS)
    # The rank that failed raises its own error, or the same as the others.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(owner, name, function)
        tear_down(session.world)
    return ""


@pytest.mark.parametrize("phase", ["collecting", "copying", "writing", "describing"])
def test_an_unforeseen_error_in_any_phase_is_told_on_all_ranks(phase: str, pool: RankPool, tmp_path: Path) -> None:
    run = small(mp=2, mp_rows=2)
    run = replace(run, checkpoint=replace(run.checkpoint, asynchronous=phase == "copying"))
    for said in pool.run(2, failing_phase, run, tmp_path / "step_00000002", phase):
        assert f"'{phase}'" in said
    assert list(tmp_path.iterdir()) == []


def work_unevenly(run: RunConfig, failing: bool) -> tuple[float, str]:
    """Do work that takes rank 1 longer, or fails there; returns seconds and what was said."""
    session = Session(run)
    started = time.monotonic()

    def work() -> None:
        if session.world.rank == 1:
            if failing:
                raise KeyError("lost")
            time.sleep(1.0)

    said = ""
    try:
        do_together(session.world, work)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    tear_down(session.world)
    return time.monotonic() - started, said


def test_ranks_wait_for_each_other_and_hear_of_failures(pool: RankPool) -> None:
    assert all(seconds >= 1.0 and said == "" for seconds, said in pool.run(2, work_unevenly, small(mp=2), False))
    (_, other), (_, own) = pool.run(2, work_unevenly, small(mp=2), True)
    assert own == "KeyError: 'lost'"
    assert other.startswith("MemparError: rank 1 failed with KeyError: 'lost'")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def save_or_say(run: RunConfig, path: Path, believe: int) -> str:
    """Save where the disk is said to have some bytes free; returns what was said against it."""
    session = Session(run)
    usage = shutil.disk_usage
    if believe:
        saving.shutil.disk_usage = lambda path: usage(path)._replace(free=believe)  # type: ignore[assignment]
    try:
        save_checkpoint(path, run, session, PROGRESS)
    except MemparError as error:
        assert error.exit_status == 1
        return str(error)
    finally:
        saving.shutil.disk_usage = usage
        tear_down(session.world)
    return ""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_full_and_read_only_disks_are_told_and_lose_nothing(saved: Path, pool: RankPool, small_disk: Path) -> None:
    run = small(tp=2, mp=2, mp_rows=2)
    assert pool.run(2, save_or_say, run, small_disk / "step_00000001", 0) == [""] * 2
    left = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(left - 300_000))
    for said in pool.run(2, save_or_say, run, small_disk / "step_00000002", 0):
        assert "MiB left; nothing was written" in said
        assert f"{small_disk} has 0.3 MiB" in said
    # The room seemed to be there, and was gone when it was needed.
    for said in pool.run(2, save_or_say, run, small_disk / "step_00000002", 2**40):
        assert "cannot be written" in said
        assert "No space left on device" in said
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["ballast", "step_00000001"]
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for said in pool.run(2, save_or_say, run, small_disk / "step_00000002", 0):
        assert "Read-only file system" in said
    verify.verify(small_disk / "step_00000001", None, print)


def overlapping_save(run: RunConfig, path: Path) -> str:
    """Save what two ranks claim to hold both."""
    session = Session(run)
    check = saving.check_coverage
    saving.check_coverage = lambda boxes: check([*boxes, boxes[-1]])
    try:
        save_checkpoint(path, run, session, PROGRESS)
    except MemparError as error:
        return str(error)
    finally:
        saving.check_coverage = check
        tear_down(session.world)
    return ""


def test_nothing_is_written_when_parts_do_not_make_up_the_whole(pool: RankPool, tmp_path: Path) -> None:
    assert saving.check_coverage is check_coverage
    for said in pool.run(2, overlapping_save, small(mp=2, mp_rows=1), tmp_path / "step_00000002"):
        assert "would be written by ranks [1, 1]" in said
        assert "nothing was written" in said
    assert list(tmp_path.iterdir()) == []


def make_checkpoints(root: Path, *steps: int) -> None:
    for step in steps:
        (root / f"step_{step:08d}").mkdir(parents=True)
        (root / f"step_{step:08d}" / "manifest.json").write_text("{}")


def names_in(root: Path) -> list[str]:
    return [path.name for path in checkpoints_in(root)]


def test_only_whole_checkpoints_count_and_the_good_one_stays(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 3, 20, 100)
    (tmp_path / "step_00000030").mkdir()
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000110.partial")
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000090.discarded")
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_123456789")
    assert names_in(tmp_path) == ["step_00000003", "step_00000020", "step_00000100", "step_123456789"]
    prune(tmp_path, 2, before=20)
    # The last one before step 20 may have to be gone back to.
    assert names_in(tmp_path) == ["step_00000003", "step_00000100", "step_123456789"]
    prune(tmp_path, 1, before=0)
    assert names_in(tmp_path) == ["step_123456789"]


def test_discarded_checkpoint_is_none_before_it_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    # Killed before a file was deleted.
    discard(tmp_path / "step_00000002")
    assert names_in(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    make_checkpoints(tmp_path, 2)
    discard(tmp_path / "step_00000002")
    discard(tmp_path / "step_00000003")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_replaced_checkpoint_keeps_its_name_when_the_new_one_cannot_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_checkpoints(tmp_path, 2)
    (tmp_path / "new").mkdir()
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if old.name == "new":
            raise OSError(5, os.strerror(5))
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        replace_directory(tmp_path / "new", tmp_path / "step_00000002")
    assert names_in(tmp_path) == ["step_00000002"]
    monkeypatch.undo()
    (tmp_path / "new" / "manifest.json").write_text("{1}")
    replace_directory(tmp_path / "new", tmp_path / "step_00000002")
    assert (tmp_path / "step_00000002" / "manifest.json").read_text() == "{1}"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
