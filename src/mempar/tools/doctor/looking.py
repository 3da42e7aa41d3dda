"""Everything about one machine but collectives: this one, or a node of several that runs the same there."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mempar.tools.doctor import (
    clocks,
    devices,
    disk,
    environment,
    file_system,
    interfaces,
    limits,
    machine,
    network,
    packages,
    versions,
)
from mempar.tools.doctor.environment import Allocation
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.machine import Machine
from mempar.tools.doctor.needs import Needs
from mempar.tools.doctor.packages import Packages

# Ranks that are tried out on a CPU where nobody says how many.
CPU_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Others:
    """What a machine is told of the other nodes.

    Attributes:
        peer: address or name of one of them; empty if none is known.
        is_shared: whether it sees the directory that they share.
    """

    peer: str = ""
    is_shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of a machine.

    Attributes:
        findings: about it.
        installed: packages.
        computer: GPUs and cores.
        num_ranks: that can be tried out on it.
    """

    findings: list[Finding]
    installed: Packages
    computer: Machine
    num_ranks: int


def look(
    needs: Needs, root: Path, num_ranks: int | None, at: Callable[[str], None], others: Others | None = None
) -> Look:
    """Look at this machine, at one subject after the other.

    Args:
        needs: what the run wants.
        root: its directory, which may not exist yet.
        num_ranks: ranks of this machine; None for one a GPU, or what the recipe wants.
        at: told what is looked at.
        others: of the nodes that are looked at together; None for this machine alone.
    """
    at("packages")
    installed, job = packages.collect(), environment.allocation()
    needs = dataclasses.replace(needs, num_nodes=max(needs.num_nodes, job.num_nodes))
    findings = versions.check(installed, context_parallel=needs.context_parallel, kernels=needs.kernels)
    at("devices")
    computer = machine.collect(installed.cuda)
    tried = num_ranks or len(computer.devices) or CPU_RANKS
    # What a recipe for GPUs would run on a CPU is not known: ranks are tried out for the sake of the machine.
    fits_kind = bool(needs.name) and (needs.gpu is None or bool(computer.devices))
    ranks_here = num_ranks or (needs.ranks_per_node if fits_kind else tried)
    findings += devices.check(
        computer,
        wanted=needs.gpu,
        num_wanted=needs.ranks_per_node if needs.gpu else 0,
        num_ranks=ranks_here,
        has_scheduler=job.has_scheduler and not job.job,
    )
    backend = "nccl" if computer.devices else "gloo"
    findings += _system(needs, root, job, ranks_here, at, backend=backend, others=others)
    return Look(
        findings=findings,
        installed=installed,
        computer=computer,
        num_ranks=min(tried, len(computer.devices) or tried),
    )


def _system(
    needs: Needs,
    root: Path,
    job: Allocation,
    num_ranks: int,
    at: Callable[[str], None],
    *,
    backend: str,
    others: Others | None,
) -> Iterator[Finding]:
    """Network, disk, limits and clocks."""
    at("the network")
    settings = environment.network_settings()
    connected = interfaces.collect(settings, (others.peer,) if others else job.hosts)
    if others and not settings.gloo_interfaces:
        # As launches do (runtime/launch/local.py).
        settings = dataclasses.replace(settings, gloo_interfaces=connected.route)
        connected = dataclasses.replace(connected, settings=settings)
    yield from network.check(connected, backend=backend, num_nodes=needs.num_nodes)
    at("the disk")
    is_shared = others is not None and others.is_shared
    yield from disk.check(file_system.collect(root), needs, job.seconds_left, is_shared=is_shared)
    at("limits and clocks")
    yield from limits.check(
        limits.collect(),
        backend=backend,
        num_ranks=num_ranks,
        world=max(needs.world, num_ranks * (needs.num_nodes if others else 1)),
        host_bytes=needs.host_bytes,
        has_infiniband=bool(connected.infiniband),
    )
    yield from clocks.check(clocks.collect(), needs.num_nodes)
