"""Doctor on limits of the system and on clocks (mempar.tools.doctor limits, clocks)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mempar.tools.doctor import clocks, limits
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.limits import Limits

GIB = 1 << 30
GOOD = Limits(
    open_files=(65536, 65536),
    locked_bytes=None,
    processes=None,
    core_bytes=0,
    shm_bytes=64 * GIB,
    memory_bytes=1024 * GIB,
)
NODE: dict[str, Any] = {"backend": "nccl", "num_ranks": 8, "world": 64, "host_bytes": 100 * GIB, "has_infiniband": True}


def look(there: Limits, **changes: Any) -> dict[str, Finding]:
    found = limits.check(there, **{**NODE, **changes})
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return {one.check.removeprefix("limits."): one for one in found}


def test_generous_limits_are_ok() -> None:
    assert {one.level for one in look(GOOD).values()} == {"ok"}


def test_open_files_grow_with_the_ranks() -> None:
    few = replace(GOOD, open_files=(1024, 65536))
    assert look(few, world=8)["open_files"].level == "ok"
    found = look(few)["open_files"]
    assert found.level == "warning" and "ulimit -n 1536" in found.remedy
    stuck = look(replace(GOOD, open_files=(256, 256)))["open_files"]
    assert stuck.level == "error" and "limits.conf" in stuck.remedy


def test_locked_memory_matters_with_infiniband() -> None:
    little = replace(GOOD, locked_bytes=8 << 20)
    assert look(little)["locked_memory"].level == "error" and "memlock" in look(little)["locked_memory"].remedy
    assert look(little, has_infiniband=False)["locked_memory"].level == "ok"
    assert look(little, backend="gloo")["locked_memory"].level == "ok"


def test_processes_core_files_and_overcommit() -> None:
    assert look(replace(GOOD, processes=1000))["processes"].level == "warning"
    assert look(replace(GOOD, core_bytes=None))["core_files"].level == "note"
    assert look(replace(GOOD, overcommit=2))["overcommit"].level == "warning"


def test_shared_memory_matters_for_nccl() -> None:
    small = replace(GOOD, shm_bytes=64 << 20)
    assert look(small)["shm"].level == "error" and "--shm-size" in look(small)["shm"].remedy
    assert look(small, backend="gloo")["shm"].level == "note"
    assert look(small, num_ranks=1)["shm"].level == "ok"


def test_memory_of_the_container_against_what_ranks_hold() -> None:
    assert look(replace(GOOD, cgroup_bytes=110 * GIB))["memory"].level == "warning"
    found = look(replace(GOOD, cgroup_bytes=64 * GIB))["memory"]
    assert found.level == "error" and "64.0 GiB" in found.what and "--mem" in found.remedy
    assert look(replace(GOOD, cgroup_bytes=64 * GIB), host_bytes=0)["memory"].level == "ok"


def test_the_least_limit_of_all_control_groups_counts(tmp_path: Path) -> None:
    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    assert limits._cgroup_bytes(tmp_path, "0::/slurm/job_7\n") is None
    (tmp_path / "slurm" / "memory.max").write_text("4096\n")
    assert limits._cgroup_bytes(tmp_path, "0::/slurm/job_7\n") == 4096
    older = tmp_path / "memory" / "job"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("2048\n")
    assert limits._cgroup_bytes(tmp_path, "5:cpu:/job\n4:memory:/job\n") == 2048
    assert limits._cgroup_bytes(tmp_path, "") is None


def test_this_machine_is_looked_at() -> None:
    there = limits.collect()
    assert there.memory_bytes > GIB // 4 and there.shm_bytes >= 0
    assert there.open_files[0] is None or there.open_files[0] > 0


def test_clocks_that_nobody_keeps() -> None:
    assert clocks.check(True, 2)[0].level == "ok"
    assert clocks.check(False, 1)[0].level == "note"
    found = clocks.check(False, 2)[0]
    assert found.level == "warning" and "chrony" in found.remedy
    assert clocks.check(None, 2)[0].level == "note"
    assert clocks.collect() in (True, False, None)


def test_skew_beyond_doubt_is_told_of() -> None:
    assert clocks.skew({"a": 0.0}, 0.001) == []
    assert clocks.skew({"a": 0.0, "b": 0.003}, 0.001)[0].level == "ok"
    # Two seconds apart, as far as one can tell within three.
    assert clocks.skew({"a": 0.0, "b": 2.0}, 3.0)[0].level == "ok"
    found = clocks.skew({"a": 0.0, "b": 2.0, "c": -1.0}, 0.001)[0]
    assert found.level == "warning" and "the clock of b is 3.0 s ahead of that of c" in found.what
    assert "chrony" in found.remedy and found.values["offsets"]["c"] == -1.0
    assert clocks.skew({"a": 0.0, "b": 60.0}, 0.001)[0].level == "error"
