"""How much memory this process may still take: of the machine, of its control groups, under its limits.

Nothing here imports torch.
"""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

# Where control groups are, and how both versions call a group's limit and what it takes.
GROUPS = Path("/sys/fs/cgroup")
MEMORY_LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
_TAKEN = {1: "memory.usage_in_bytes", 2: "memory.current"}
# Of what a group takes, in memory.stat: files that nobody has used for a while, which go when memory is short.
_FILES = {1: "total_inactive_file", 2: "inactive_file"}


def available_bytes() -> int:
    """Bytes that this process may take without others being pushed out, as far as that is known; never negative."""
    rooms = [psutil.virtual_memory().available, *_group_rooms(GROUPS, membership()), *_limit_rooms()]
    return max(0, min(rooms))


def membership() -> str:
    """This process's control groups, as /proc/self/cgroup lists them; empty where there are none."""
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def memory_groups(root: Path, groups: str) -> Iterator[tuple[Path, int]]:
    """The control groups that may limit memory, a process's own and all above them.

    Args:
        root: /sys/fs/cgroup.
        groups: contents of /proc/self/cgroup.

    Yields:
        A group's folder, which may not be there, and the version of control groups.
    """
    for line in groups.splitlines():
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base, version = (root / "memory", 1) if controllers else (root, 2)
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(base):
                yield folder, version


def _group_rooms(root: Path, groups: str) -> Iterator[int]:
    for folder, version in memory_groups(root, groups):
        try:
            limit = (folder / MEMORY_LIMITS[version]).read_text().strip()
            taken = int((folder / _TAKEN[version]).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            yield int(limit) - taken + int(stat.get(_FILES[version], 0))


def _limit_rooms() -> Iterator[int]:
    """Room under `ulimit -d` and `ulimit -v`."""
    taken = psutil.Process().memory_info()
    for limit, num_bytes in ((resource.RLIMIT_DATA, taken.data), (resource.RLIMIT_AS, taken.vms)):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - num_bytes
