"""How much memory may still be taken, by machine, control groups and limits."""

import resource
from pathlib import Path

import psutil
import pytest

from mempar.runtime import host_memory


def make_group(folder: Path, names: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in names.items():
        (folder / name).write_text(text)


def test_room_is_the_least_of_machine_groups_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "membership", lambda: "4:memory:/job/step\n1:cpu:/job\n0::/slurm/job_7\n")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    machine = psutil.virtual_memory().total
    assert 0 < host_memory.available_bytes() <= machine
    stat = "anon 5\ninactive_file 100\n"
    make_group(tmp_path / "slurm" / "job_7", {"memory.max": "max\n", "memory.current": "7", "memory.stat": stat})
    assert host_memory.available_bytes() > 1 << 20
    make_group(tmp_path / "slurm", {"memory.max": "9000\n", "memory.current": "4000", "memory.stat": stat})
    assert host_memory.available_bytes() == 5100
    # The first version: one group above the process's own.
    taken = {"memory.usage_in_bytes": "4000", "memory.stat": "inactive_file 1\ntotal_inactive_file 50\n"}
    make_group(tmp_path / "memory" / "job", {"memory.limit_in_bytes": "6000\n", **taken})
    assert host_memory.available_bytes() == 2050
    make_group(tmp_path / "memory" / "job", {"memory.limit_in_bytes": "3000\n"})
    assert host_memory.available_bytes() == 0


def test_limits_of_the_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "membership", lambda: "")
    taken = psutil.Process().memory_info()
    for limit, num_bytes in ((resource.RLIMIT_DATA, taken.data), (resource.RLIMIT_AS, taken.vms)):
        limits = {limit: (num_bytes + (64 << 20), -1)}
        monkeypatch.setattr(resource, "getrlimit", lambda each, limits=limits: limits.get(each, (-1, -1)))
        assert 32 << 20 < host_memory.available_bytes() < 96 << 20
