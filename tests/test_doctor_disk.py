"""Doctor on the disk under a run (mempar.tools.doctor disk, file_system, needs)."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.overrides import override
from mempar.tools.doctor import disk, file_system
from mempar.tools.doctor.file_system import FileSystem, Mount
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.needs import Needs, measured_step, needs_of

GIB = 1 << 30
GOOD = FileSystem(
    path=Path("/shared/runs"),
    mount=Mount(device="server:/export", point="/shared", kind="nfs4"),
    free_bytes=1000 * GIB,
    free_files=10**6,
    bytes_per_s=2e9,
    locks=True,
)
# A checkpoint of 100 GiB takes 54 s at 2 GB/s.
RUN = Needs(
    name="large",
    world=16,
    checkpoint_bytes=100 * GIB,
    keep=2,
    save_interval=1000,
    step_seconds=2.0,
    is_measured=True,
    limit_seconds=86400,
)
MOUNTS = """\
/dev/vda / ext4 rw 0 0
proc /proc proc rw 0 0
server:/export /shared nfs4 rw 0 0
tmpfs /shared/fast\\040disk tmpfs rw 0 0
"""


def look(there: FileSystem, needs: Needs = RUN, left: float | None = None) -> dict[str, Finding]:
    found = disk.check(there, needs, left)
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return {one.check.removeprefix("disk."): one for one in found}


def test_a_large_fast_shared_disk_is_ok() -> None:
    found = look(GOOD, replace(RUN, num_nodes=2))
    assert {one.level for one in found.values()} == {"ok"}
    assert found["rate"].values["checkpoint_seconds"] == pytest.approx(50 * GIB / 2e9)


def test_several_machines_need_a_shared_file_system() -> None:
    local = replace(GOOD, mount=Mount(device="/dev/vda", point="/", kind="ext4"))
    assert look(local)["file_system"].level == "ok"
    found = look(local, replace(RUN, num_nodes=2))["file_system"]
    assert found.level == "error" and "2 machines" in found.rule and "--out" in found.remedy
    odd = replace(GOOD, mount=Mount(device="x", point="/x", kind="fuse.odd"))
    assert look(odd, replace(RUN, num_nodes=2))["file_system"].level == "warning"
    kinds = {"tmpfs": "warning", "overlay": "note", "lustre": "ok", "fuse.juicefs": "ok"}
    for kind, level in kinds.items():
        assert look(replace(GOOD, mount=replace(GOOD.mount, kind=kind)))["file_system"].level == level


def test_room_for_one_more_checkpoint_than_is_kept() -> None:
    assert look(replace(GOOD, free_bytes=301 * GIB))["room"].level == "ok"
    found = look(replace(GOOD, free_bytes=299 * GIB))["room"]
    assert found.level == "error" and "3 of them 300.0 GiB" in found.what and "keep_checkpoints" in found.remedy
    assert look(replace(GOOD, free_bytes=GIB), Needs())["room"].level == "warning"
    assert "files" not in look(GOOD) and look(replace(GOOD, free_files=100))["files"].level == "error"


def test_what_cannot_be_written_or_locked() -> None:
    found = look(replace(GOOD, problem="Read-only file system", bytes_per_s=0.0))
    assert found["write"].level == "error" and "Read-only" in found["write"].what and "rate" not in found
    assert look(replace(GOOD, locks=False))["locks"].level == "warning"
    assert look(replace(GOOD, bytes_per_s=0.0))["rate"].level == "note"


def test_time_of_a_checkpoint_against_limits_and_intervals() -> None:
    slow = replace(GOOD, bytes_per_s=5e6)
    found = look(slow)
    assert "6.0 h" in found["rate"].what
    assert found["time_limit"].level == "warning" and "train.time_limit_minutes" in found["time_limit"].what
    assert found["save_interval"].level == "warning" and "33.3 min" in found["save_interval"].what
    assert look(slow, replace(RUN, limit_seconds=3600.0))["time_limit"].level == "error"
    assert look(GOOD, replace(RUN, limit_seconds=0.0), left=60.0)["time_limit"].level == "error"
    assert "time_limit" not in look(GOOD, left=86400.0)
    assert look(slow, replace(RUN, is_measured=False))["save_interval"].level == "note"
    # Beside training a save may take as long as the steps to the next one.
    beside = replace(RUN, asynchronous=True, limit_seconds=0.0)
    assert "save_interval" not in look(replace(GOOD, bytes_per_s=1e8), beside)
    assert look(replace(GOOD, bytes_per_s=1e8))["save_interval"].level == "warning"
    assert look(GOOD, replace(RUN, save_interval=0))["save_interval"].level == "note"


def test_mounts_are_found_by_the_longest_point() -> None:
    def kind(path: str) -> str:
        return file_system.mount_of(Path(path), MOUNTS).kind

    assert (kind("/home/x"), kind("/shared/runs"), kind("/sharedness")) == ("ext4", "nfs4", "ext4")
    assert kind("/shared/fast disk/runs") == "tmpfs"
    assert file_system.mount_of(Path("/x"), "").kind == "unknown"


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "_MOST_BYTES", 8 << 20)
    found = file_system.collect(tmp_path / "not" / "yet")
    assert found.path == tmp_path.resolve() and not list(tmp_path.iterdir())
    assert found.problem == "" and found.locks and found.bytes_per_s > 1e5 and found.free_bytes > 0


def test_a_slow_disk_is_given_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], []

    def slow_sync(number: int) -> None:
        # A megabyte a second.
        written.append(os.fstat(number).st_size - sum(written))
        clock[0] += written[-1] / (1 << 20)

    monkeypatch.setattr(file_system.os, "fsync", slow_sync)
    monkeypatch.setattr(file_system.time, "monotonic", lambda: clock[0])
    assert file_system.write_rate(tmp_path / "x", 256 << 20) == pytest.approx(1 << 20)
    assert clock[0] <= 4.0
    assert file_system.write_rate(tmp_path / "x", 1000) == 0.0


def test_a_directory_that_refuses_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(file_system.tempfile, "mkstemp", refuse)
    assert file_system.collect(tmp_path).problem == "Read-only file system"


def test_needs_of_a_recipe(tmp_path: Path) -> None:
    smoke = find_recipe("smoke")
    plain = needs_of(smoke, tmp_path, None)
    assert (plain.world, plain.num_nodes, plain.keep, plain.save_interval) == (1, 1, 2, 0)
    assert 70e6 < plain.checkpoint_bytes < 90e6 and plain.host_bytes > plain.checkpoint_bytes
    large = override(smoke, ["hardware.gpu=h200", "hardware.gpus=16", "parallel.mp=8", "train.time_limit_minutes=10"])
    needs = needs_of(large, tmp_path, None)
    assert (needs.world, needs.num_nodes, needs.ranks_per_node, needs.limit_seconds) == (16, 2, 8, 600.0)
    assert needs.step_seconds > 0 and needs.host_bytes == 0
    assert needs_of(large, tmp_path, 4).num_nodes == 4
    with pytest.raises(ConfigError, match="mp=3"):
        needs_of(override(smoke, ["parallel.mp=3", "hardware.gpu=h200", "hardware.gpus=16"]), tmp_path, None)
    unreadable = needs_of(override(smoke, ["data.tokenizer=hf:/nowhere"]), tmp_path, None)
    assert unreadable.checkpoint_bytes == 0 and "/nowhere" in unreadable.problem
    assert "not known" in look(GOOD, unreadable)["room"].what


def test_steps_of_a_run_that_has_begun_are_measured(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "seconds": seconds} for step, seconds in enumerate((9.0, 2.0, 3.0))]
    lines = [json.dumps(row) for row in rows] + [json.dumps({"step": 3, "heldout_loss": 2.0}), '{"step": 4, "sec']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert measured_step(tmp_path / "metrics.jsonl") == 3.0
    assert measured_step(tmp_path / "absent") == 0.0
    needs = needs_of(find_recipe("smoke"), tmp_path, None)
    assert needs.step_seconds == 3.0 and needs.is_measured
