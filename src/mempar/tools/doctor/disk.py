"""The disk under a run: room for its checkpoints, the time that one takes, and what other machines see of it."""

from mempar.tools.doctor.file_system import FileSystem
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding, duration, size
from mempar.tools.doctor.needs import Needs

# Files of a checkpoint: two of every rank and some that there are one of, a tensor of a table's state in each.
_FILES_OF_RANK, _OTHER_FILES = 8, 32
# Of a time limit, and of the steps between two saves: what saving may take without anyone minding.
_LIMIT_SHARE, _LIMIT_MOST, _INTERVAL_SHARE = 0.05, 0.5, 0.1
# Without a recipe: a disk that is nearly full whatever is to come.
_LEAST_FREE_BYTES = 10 << 30


def check(disk: FileSystem, needs: Needs, scheduler_seconds: float | None, *, is_shared: bool = False) -> list[Finding]:
    """Judge it.

    Args:
        disk: what is there.
        needs: what the recipe wants; no recipe is one that wants nothing known.
        scheduler_seconds: left of the job's time limit; None for none.
        is_shared: whether this machine was seen to share it with the others, whatever its kind.
    """
    findings = [_kind(disk, 1 if is_shared else needs.num_nodes), _room(disk, needs), *_files(disk, needs)]
    if disk.problem:
        return [*findings, _not_writable(disk)]
    return [*findings, _locks(disk), *_rate(disk, needs, scheduler_seconds)]


def checkpoint_seconds(num_bytes: int, num_nodes: int, bytes_per_s: float) -> float:
    """Time to write a checkpoint: every machine writes its share, at the rate measured here."""
    return num_bytes / num_nodes / bytes_per_s if bytes_per_s else 0.0


def _kind(disk: FileSystem, num_nodes: int) -> Finding:
    check, mount = "disk.file_system", disk.mount
    what = f"{disk.path} is on {mount.kind} ({mount.device or 'unknown'}, mounted on {mount.point})"
    values = {"kind": mount.kind, "is_network": mount.is_network}
    if mount.is_in_memory:
        return Finding(
            check=check,
            level=WARNING,
            what=what,
            rule="what lies there takes this machine's memory and is gone when it restarts",
            remedy="choose --out on a disk",
            values=values,
        )
    if num_nodes > 1 and not mount.is_network:
        return Finding(
            check=check,
            level=WARNING if mount.kind.startswith("fuse") or mount.kind == "unknown" else ERROR,
            what=what,
            rule=f"the run spans {num_nodes} machines, and all of them write to one directory",
            remedy="choose --out on a file system that all of them mount (NFS, Lustre, GPFS ...); if this one is "
            "shared in another way, go on",
            values=values,
        )
    if mount.kind == "overlay":
        return Finding(
            check=check,
            level=NOTE,
            what=what,
            rule="a container's own layer is removed with the container",
            remedy="mount a directory of the host, and choose --out there",
            values=values,
        )
    return Finding(check=check, level=OK, what=what, values=values)


def _room(disk: FileSystem, needs: Needs) -> Finding:
    check, free = "disk.room", size(disk.free_bytes)
    values = {"free_bytes": disk.free_bytes, "checkpoint_bytes": needs.checkpoint_bytes}
    if not needs.checkpoint_bytes:
        if disk.free_bytes < _LEAST_FREE_BYTES:
            return Finding(
                check=check,
                level=WARNING,
                what=f"{free} free",
                rule="a checkpoint of a model with a memory takes gigabytes",
                remedy="make room; with a recipe (mempar doctor RECIPE) its checkpoints are counted",
                values=values,
            )
        problem = f"; the size of a checkpoint is not known: {needs.problem}" if needs.problem else ""
        return Finding(check=check, level=OK, what=f"{free} free{problem}", values=values)
    # One more than is kept lies there until the new one is whole.
    count = needs.keep + 1
    what = f"{free} free; a checkpoint of {needs.name} takes {size(needs.checkpoint_bytes)}, {count} of them "
    what += size(count * needs.checkpoint_bytes)
    if disk.free_bytes < count * needs.checkpoint_bytes:
        return Finding(
            check=check,
            level=ERROR,
            what=what,
            rule=f"train.keep_checkpoints={needs.keep} are kept while one more is written",
            remedy="make room, choose another --out, or lower train.keep_checkpoints",
            values=values,
        )
    return Finding(check=check, level=OK, what=what, values=values)


def _files(disk: FileSystem, needs: Needs) -> list[Finding]:
    if disk.free_files is None:
        return []
    wanted = (needs.keep + 1) * (needs.world * _FILES_OF_RANK + _OTHER_FILES)
    if disk.free_files >= wanted:
        return []
    return [
        Finding(
            check="disk.files",
            level=ERROR,
            what=f"room for {disk.free_files} more files (inodes)",
            rule=f"checkpoints of {needs.world} ranks take up to {wanted}",
            remedy="delete files you do not need, or choose another --out (quotas: `df -i`, `lfs quota`)",
            values={"free_files": disk.free_files},
        )
    ]


def _not_writable(disk: FileSystem) -> Finding:
    return Finding(
        check="disk.write",
        level=ERROR,
        what=f"nothing can be written to {disk.path} ({disk.problem})",
        rule="a run writes its configuration, metrics and checkpoints there; the rate was not measured",
        remedy="choose a writable --out, or make room",
    )


def _locks(disk: FileSystem) -> Finding:
    if disk.locks:
        return Finding(check="disk.locks", level=OK, what="flock keeps a second writer out")
    return Finding(
        check="disk.locks",
        level=WARNING,
        what=f"flock does not work on {disk.mount.kind}",
        rule="a lock keeps two runs from writing to one directory; without it nothing does",
        remedy="mount it with locks (Lustre: -o flock; NFS: without nolock), or take care yourself",
    )


def _rate(disk: FileSystem, needs: Needs, scheduler_seconds: float | None) -> list[Finding]:
    if not disk.bytes_per_s:
        return [
            Finding(
                check="disk.rate",
                level=NOTE,
                what="too little room to measure how fast the disk is",
                rule="a few hundred MB are written for that",
                remedy="make room",
            )
        ]
    what, values = f"{disk.bytes_per_s / 1e6:.0f} MB/s with fsync, one process", {"bytes_per_s": disk.bytes_per_s}
    if not needs.checkpoint_bytes:
        return [Finding(check="disk.rate", level=OK, what=what, values=values)]
    seconds = checkpoint_seconds(needs.checkpoint_bytes, needs.num_nodes, disk.bytes_per_s)
    of_nodes = f" if each of {needs.num_nodes} machines writes its share at that rate" if needs.num_nodes > 1 else ""
    what += f": a checkpoint takes about {duration(seconds)}{of_nodes}"
    return [
        Finding(check="disk.rate", level=OK, what=what, values={**values, "checkpoint_seconds": seconds}),
        *_against_limit(seconds, "train.time_limit_minutes", needs.limit_seconds),
        *_against_limit(seconds, "what is left of the job's time limit", scheduler_seconds),
        *_against_interval(seconds, needs),
    ]


def _against_limit(seconds: float, name: str, limit: float | None) -> list[Finding]:
    if not limit or seconds <= _LIMIT_SHARE * limit:
        return []
    return [
        Finding(
            check="disk.time_limit",
            level=ERROR if seconds > _LIMIT_MOST * limit else WARNING,
            what=f"a checkpoint takes about {duration(seconds)}, and {name} is {duration(limit)}",
            rule=f"a run keeps {_LIMIT_SHARE:.0%} of its limit free for its first save, and all that a save took later",
            remedy="raise the limit, choose a faster --out, or save beside training (checkpoint.asynchronous=true)",
            values={"checkpoint_seconds": seconds, "limit_seconds": limit},
        )
    ]


def _against_interval(seconds: float, needs: Needs) -> list[Finding]:
    check = "disk.save_interval"
    if not needs.save_interval:
        return [
            Finding(
                check=check,
                level=NOTE,
                what="train.save_interval=0",
                rule="only the end of the run, SIGTERM and a time limit save; a crash loses all since the beginning",
                remedy="set train.save_interval to the steps that you are ready to lose",
            )
        ]
    between = needs.save_interval * needs.step_seconds
    share = _INTERVAL_SHARE if not needs.asynchronous else 1.0
    if not between or seconds <= share * between:
        return []
    return [
        Finding(
            check=check,
            # The least that a step can take proves nothing.
            level=WARNING if needs.is_measured else NOTE,
            what=f"a checkpoint takes about {duration(seconds)}, and train.save_interval={needs.save_interval} steps "
            f"{duration(between)}{'' if needs.is_measured else ' or more'}",
            rule="training waits while a checkpoint is written"
            if not needs.asynchronous
            else "the next save waits for the one before",
            remedy="raise train.save_interval, choose a faster --out, or set checkpoint.asynchronous=true",
            values={"checkpoint_seconds": seconds, "interval_seconds": between},
        )
    ]
