"""Limits of the operating system that ranks run into: open files, locked memory, shared memory, memory."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from mempar.runtime.host_memory import GROUPS, MEMORY_LIMITS, membership, memory_groups
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding, counted, size

# Connections of a rank grow with the ranks in its groups, about a dozen of them; the rest are files and libraries.
_FILES_A_PEER, _OTHER_FILES = 16, 512
# Threads of a rank: torch's pools, gloo's and NCCL's, the saving of checkpoints.
_THREADS_A_RANK = 256
# NCCL takes some 10 MB for every pair of ranks of a machine; containers come with 64 MiB.
_LEAST_SHM_BYTES = 1 << 30
_SHARE_OF_MEMORY = 0.8
_NEVER = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the system allows; None is no limit.

    Attributes:
        open_files: that a process may have; soft and hard.
        locked_bytes: of memory that may be locked.
        processes: and threads of this user.
        core_bytes: of a core file.
        shm_bytes: of /dev/shm; 0 if it is not there.
        memory_bytes: of this machine.
        cgroup_bytes: that the container or job may take.
        overcommit: /proc/sys/vm/overcommit_memory.
    """

    open_files: tuple[int | None, int | None]
    locked_bytes: int | None
    processes: int | None
    core_bytes: int | None
    shm_bytes: int
    memory_bytes: int
    cgroup_bytes: int | None = None
    overcommit: int = 0


def collect() -> Limits:
    """Look at this process's limits, which its ranks inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        open_files=(_limit(soft), _limit(hard)),
        locked_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        processes=_limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        core_bytes=_limit(resource.getrlimit(resource.RLIMIT_CORE)[0]),
        shm_bytes=_shm_bytes(),
        memory_bytes=_memory_bytes(),
        cgroup_bytes=_cgroup_bytes(GROUPS, membership()),
        overcommit=_number(Path("/proc/sys/vm/overcommit_memory")) or 0,
    )


def check(
    limits: Limits, *, backend: str, num_ranks: int, world: int, host_bytes: float, has_infiniband: bool
) -> list[Finding]:
    """Judge them.

    Args:
        limits: what the system allows.
        backend: `nccl` or `gloo`.
        num_ranks: ranks on this machine.
        world: ranks in all.
        host_bytes: least of this machine's memory that its ranks take; 0 if it is not known.
        has_infiniband: whether there are such devices.
    """
    return [
        _open_files(limits, world),
        _locked(limits, has_infiniband and backend == "nccl"),
        *_processes(limits, num_ranks),
        *_core(limits, num_ranks),
        *_shm(limits, backend, num_ranks),
        _memory(limits, host_bytes, num_ranks),
        *_overcommit(limits),
    ]


def _open_files(limits: Limits, world: int) -> Finding:
    soft, hard = limits.open_files
    wanted = _OTHER_FILES + _FILES_A_PEER * world
    if soft is None or soft >= wanted:
        return Finding(check="limits.open_files", level=OK, what=f"{_words(soft)} open files a process (ulimit -n)")
    may = hard is None or hard >= wanted
    return Finding(
        check="limits.open_files",
        level=WARNING if soft >= wanted // 4 else ERROR,
        what=f"{soft} open files a process (ulimit -n), of at most {_words(hard)}",
        rule=f"a rank among {world} has up to {wanted} connections and files",
        remedy=f"ulimit -n {wanted}, in the launch profile's setup"
        if may
        else f"raise nofile to {wanted} in /etc/security/limits.conf (or the container's --ulimit)",
        values={"open_files": soft, "wanted": wanted},
    )


def _locked(limits: Limits, is_needed: bool) -> Finding:
    memory = limits.locked_bytes
    words = "any amount of" if memory is None else size(memory)
    if memory is None or not is_needed:
        return Finding(check="limits.locked_memory", level=OK, what=f"{words} memory may be locked (ulimit -l)")
    return Finding(
        check="limits.locked_memory",
        level=ERROR,
        what=f"{words} memory may be locked (ulimit -l), and there is InfiniBand",
        rule="RDMA locks its buffers; NCCL fails to register them otherwise",
        remedy="memlock unlimited in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd, --ulimit memlock=-1 "
        "for containers",
        values={"locked_bytes": memory},
    )


def _processes(limits: Limits, num_ranks: int) -> list[Finding]:
    wanted = _THREADS_A_RANK * num_ranks
    if limits.processes is None or limits.processes >= wanted:
        return []
    return [
        Finding(
            check="limits.processes",
            level=WARNING,
            what=f"{limits.processes} processes and threads of this user (ulimit -u)",
            rule=f"{counted(num_ranks, 'rank')} may have up to {wanted} threads",
            remedy=f"raise nproc to {wanted} or more in /etc/security/limits.conf",
            values={"processes": limits.processes, "wanted": wanted},
        )
    ]


def _core(limits: Limits, num_ranks: int) -> list[Finding]:
    if limits.core_bytes is not None:
        return []
    return [
        Finding(
            check="limits.core_files",
            level=NOTE,
            what="core files are not limited (ulimit -c)",
            rule=f"a crash may write the memory of {counted(num_ranks, 'rank')} to the disk while the job waits",
            remedy="ulimit -c 0, unless you want to look at them",
        )
    ]


def _shm(limits: Limits, backend: str, num_ranks: int) -> list[Finding]:
    if limits.shm_bytes >= _LEAST_SHM_BYTES or num_ranks == 1:
        return [Finding(check="limits.shm", level=OK, what=f"{size(limits.shm_bytes)} of shared memory (/dev/shm)")]
    return [
        Finding(
            check="limits.shm",
            level=ERROR if backend == "nccl" else NOTE,
            what=f"{size(limits.shm_bytes)} of shared memory (/dev/shm)",
            rule="NCCL passes data between ranks of a machine through it, and fails in odd ways where it is small"
            + ("" if backend == "nccl" else "; gloo does not need it"),
            remedy="start the container with --shm-size=16g or --ipc=host" + ("" if backend == "nccl" else " for NCCL"),
            values={"shm_bytes": limits.shm_bytes},
        )
    ]


def _memory(limits: Limits, host_bytes: float, num_ranks: int) -> Finding:
    limit = min(limits.memory_bytes, limits.cgroup_bytes or limits.memory_bytes)
    whose = "the container or job may take" if limit < limits.memory_bytes else "this machine has"
    what = f"{whose} {size(limit)} of memory"
    values = {"memory_bytes": limit, "wanted_bytes": int(host_bytes)}
    if not host_bytes:
        return Finding(check="limits.memory", level=OK, what=what, values=values)
    what += f"; {counted(num_ranks, 'rank')} here hold at least {size(host_bytes)}"
    if host_bytes <= _SHARE_OF_MEMORY * limit:
        return Finding(check="limits.memory", level=OK, what=what, values=values)
    return Finding(
        check="limits.memory",
        level=ERROR if host_bytes > limit else WARNING,
        what=what,
        rule="activations, buffers and the page cache come on top, and the kernel kills what takes too much",
        remedy="ask for more (--mem), use more machines, or checkpoint.asynchronous=false where it is on",
        values=values,
    )


def _overcommit(limits: Limits) -> list[Finding]:
    if limits.overcommit != _NEVER:
        return []
    return [
        Finding(
            check="limits.overcommit",
            level=WARNING,
            what="vm.overcommit_memory=2",
            rule="CUDA and torch reserve address space many times what they use, which is then refused",
            remedy="sysctl vm.overcommit_memory=0",
        )
    ]


def _words(count: int | None) -> str:
    return "any number of" if count is None else str(count)


def _limit(number: int) -> int | None:
    return None if number == resource.RLIM_INFINITY else number


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _shm_bytes() -> int:
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return room.f_blocks * room.f_frsize


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes(root: Path, groups: str) -> int | None:
    """The least memory limit of this process's control groups and all above them.

    Args:
        root: /sys/fs/cgroup.
        groups: contents of /proc/self/cgroup.
    """
    limits = (_number(group / MEMORY_LIMITS[version]) for group, version in memory_groups(root, groups))
    return min((limit for limit in limits if limit is not None), default=None)
