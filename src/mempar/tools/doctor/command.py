"""`mempar doctor`: look at everything, say what was found, and whether a run would fail."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.hardware import GPUS
from mempar.runtime.overrides import override
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
    smoke,
    versions,
)
from mempar.tools.doctor.environment import Allocation
from mempar.tools.doctor.finding import ERROR, NOTE, Finding, worst
from mempar.tools.doctor.machine import Machine
from mempar.tools.doctor.needs import Needs, needs_of
from mempar.tools.doctor.report import show

# Ranks that are tried out on a CPU where nobody says how many.
_CPU_RANKS = 2


def doctor(
    recipe: str | None,
    assignments: list[str],
    *,
    out: Path | None,
    num_ranks: int | None,
    as_json: bool,
    say: Callable[[str], None],
) -> int:
    """Look at this machine, and at what a recipe wants of it.

    Args:
        recipe: name, YAML file or module:function; None for no run in particular.
        assignments: `KEY=VALUE` overrides.
        out: directory that the run would have; `runs` by default.
        num_ranks: ranks of this machine, to be tried out; None for one a GPU, or two.
        as_json: print a list of objects, and nothing else.
        say: prints a line.

    Returns:
        The exit status: 1 when a run would fail, else 0.

    Raises:
        ConfigError: for bad input.
    """
    if num_ranks is not None and num_ranks < 1:
        raise ConfigError(f"--nproc {num_ranks} starts no rank; collectives are tried out on at least one; raise it.")
    root = out or Path("runs")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; a run needs a directory; choose another --out.")
    if recipe is not None and "=" in recipe and not recipe.startswith(("/", ".")):
        raise ConfigError(f"'{recipe}' is no recipe; settings follow a recipe; write mempar doctor RECIPE {recipe}.")
    needs = needs_of(override(find_recipe(recipe), assignments), root, num_ranks) if recipe else Needs()
    console = Console(stderr=True)
    with console.status("looking ...") as status:
        findings = list(_look(needs, root, num_ranks, lambda what: status.update(f"looking at {what} ...")))
    if as_json:
        say(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        show(findings, Console())
    return int(worst(findings) == ERROR)


def _look(needs: Needs, root: Path, num_ranks: int | None, at: Callable[[str], None]) -> Iterator[Finding]:
    """Look at one subject after the other."""
    at("packages")
    installed, job = packages.collect(), environment.allocation()
    needs = dataclasses.replace(needs, num_nodes=max(needs.num_nodes, job.num_nodes))
    yield from versions.check(installed, context_parallel=needs.context_parallel, kernels=needs.kernels)
    at("devices")
    computer = machine.collect(installed.cuda)
    tried = num_ranks or len(computer.devices) or _CPU_RANKS
    # What a recipe for GPUs would run on a CPU is not known: ranks are tried out for the sake of the machine.
    fits_kind = bool(needs.name) and (needs.gpu is None or bool(computer.devices))
    ranks_here = num_ranks or (needs.ranks_per_node if fits_kind else tried)
    yield from devices.check(
        computer,
        wanted=needs.gpu,
        num_wanted=needs.ranks_per_node if needs.gpu else 0,
        num_ranks=ranks_here,
        has_scheduler=job.has_scheduler and not job.job,
    )
    yield from _system(needs, root, job, ranks_here, at, backend="nccl" if computer.devices else "gloo")
    if "torch" in installed.versions:
        tried = min(tried, len(computer.devices) or tried)
        at(f"collectives of {tried} ranks")
        yield from smoke.judge(smoke.launch(tried), _link(computer))
    if needs.num_nodes > 1:
        yield _elsewhere(needs.num_nodes)


def _system(
    needs: Needs, root: Path, job: Allocation, num_ranks: int, at: Callable[[str], None], *, backend: str
) -> Iterator[Finding]:
    """Network, disk, limits and clocks."""
    at("the network")
    connected = interfaces.collect(environment.network_settings(), job.hosts)
    yield from network.check(connected, backend=backend, num_nodes=needs.num_nodes)
    at("the disk")
    yield from disk.check(file_system.collect(root), needs, job.seconds_left)
    at("limits and clocks")
    yield from limits.check(
        limits.collect(),
        backend=backend,
        num_ranks=num_ranks,
        world=max(needs.world, num_ranks),
        host_bytes=needs.host_bytes,
        has_infiniband=bool(connected.infiniband),
    )
    yield from clocks.check(clocks.collect(), needs.num_nodes)


def _link(computer: Machine) -> float | None:
    """NVLink's bandwidth between the GPUs here, of those that have figures and are no plain PCIe cards."""
    name = computer.devices[0].name if computer.devices else "PCIe"
    return next((gpu.link_gb_per_s for gpu in GPUS.values() if "PCIe" not in name and machine.is_kind(name, gpu)), None)


def _elsewhere(num_nodes: int) -> Finding:
    return Finding(
        check="smoke.nodes",
        level=NOTE,
        what=f"this machine alone was looked at, of {num_nodes}",
        rule="collectives between machines and the clocks of the others were not tried",
        remedy="run mempar doctor on each (srun --ntasks-per-node=1 mempar doctor --json), and the ranks of the smoke "
        "test on all: torchrun ... -m mempar.tools.doctor.smoke_rank --reports DIR",
    )
