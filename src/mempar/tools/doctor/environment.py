"""What doctor reads from environment variables, those of schedulers and of torchrun among them; nothing else does.

Nothing here imports torch.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

# A scheduler that is busy is not waited for.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a scheduler gave to the job that doctor runs in.

    Attributes:
        job: its number; empty outside a job.
        hosts: names of its hosts, as far as they are known.
        num_nodes: how many.
        seconds_left: until its time limit; None where there is none, or it is not known.
        has_scheduler: whether jobs can be submitted from here.
    """

    job: str = ""
    hosts: tuple[str, ...] = ()
    num_nodes: int = 1
    seconds_left: float | None = None
    has_scheduler: bool = False


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Variables that choose interfaces.

    Attributes:
        gloo_interfaces: GLOO_SOCKET_IFNAME, names separated by commas.
        nccl_interfaces: NCCL_SOCKET_IFNAME, beginnings of names; `^` excludes, `=` means whole names.
        rendezvous_host: MASTER_ADDR.
        infiniband_off: NCCL_IB_DISABLE.
    """

    gloo_interfaces: str = ""
    nccl_interfaces: str = ""
    rendezvous_host: str = ""
    infiniband_off: bool = False


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where torchrun put a rank: its number, that on its machine, and how many there are in all."""

    rank: int
    local_rank: int
    world: int


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """Which node of several this one is: its number, and its name."""

    node_rank: int
    name: str


def allocation() -> Allocation:
    """The job around this process."""
    job, nodes = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_NUM_NODES", "1")
    has_scheduler = shutil.which("sbatch") is not None
    if not job:
        return Allocation(has_scheduler=has_scheduler)
    node_list = os.environ.get("SLURM_JOB_NODELIST", "")
    return Allocation(
        job=job,
        hosts=tuple(_output("scontrol", "show", "hostnames", node_list).split()) if node_list else (),
        num_nodes=int(nodes) if nodes.isdigit() else 1,
        seconds_left=_seconds_left(os.environ.get("SLURM_JOB_END_TIME", ""), job),
        has_scheduler=has_scheduler,
    )


def network_settings() -> NetworkSettings:
    """Variables that choose interfaces."""
    return NetworkSettings(
        gloo_interfaces=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        nccl_interfaces=os.environ.get("NCCL_SOCKET_IFNAME", ""),
        rendezvous_host=os.environ.get("MASTER_ADDR", ""),
        infiniband_off=os.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"),
    )


def rank_place() -> RankPlace:
    """Where torchrun put this process; alone without it."""
    numbers = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0))}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return RankPlace(rank=numbers["RANK"], local_rank=numbers["LOCAL_RANK"], world=world)


def node_place() -> NodePlace:
    """Which of a job's nodes this one is; the only one outside a job."""
    number = os.environ.get("SLURM_NODEID", "")
    return NodePlace(
        node_rank=int(number) if number.isdigit() else 0,
        name=os.environ.get("SLURMD_NODENAME", "") or os.uname().nodename,
    )


def node_address(name: str) -> str:
    """Where the scheduler reaches a node; its name where it does not say."""
    found = re.search(r"\bNodeAddr=(\S+)", _output("scontrol", "show", "node", "--oneliner", name))
    return found.group(1) if found else name


def parse_days(text: str) -> float | None:
    """Seconds of a time as SLURM writes it, `[days-][[hours:]minutes:]seconds`; None if it is no such time."""
    days, dash, clock = text.strip().rpartition("-")
    fields = clock.split(":")
    if not all(field.isdigit() for field in [*fields, *([days] if dash else [])]) or len(fields) > 3:
        return None
    seconds = 0
    for field in fields:
        seconds = seconds * 60 + int(field)
    return float(seconds + int(days or 0) * 86400)


def _seconds_left(end_time: str, job: str) -> float | None:
    if end_time.isdigit():
        return max(0.0, int(end_time) - time.time())
    return parse_days(_output("squeue", "-h", "-j", job, "-o", "%L"))


def _output(*command: str) -> str:
    """What a command of the scheduler prints; empty when it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
