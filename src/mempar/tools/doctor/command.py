"""`mempar doctor`: look at everything, say what was found, and whether a run would fail."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.hardware import GPUS
from mempar.runtime.overrides import override
from mempar.tools.doctor import clocks, devices, disk, environment, file_system, limits, network, smoke, versions
from mempar.tools.doctor.finding import ERROR, NOTE, Finding, worst
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
    packages = versions.collect()
    yield from versions.check(packages, versions.Wishes(context_parallel=needs.context_parallel, kernels=needs.kernels))
    at("devices")
    job, machine = environment.allocation(), devices.collect(packages.cuda)
    backend = "nccl" if machine.devices else "gloo"
    tried = num_ranks or len(machine.devices) or _CPU_RANKS
    # Without a GPU a recipe for many cannot be tried as it is: what it would need here is left to the estimate.
    here = num_ranks or (needs.ranks_per_node if needs.name and (machine.devices or not needs.gpu) else tried)
    num_nodes = max(needs.num_nodes, job.num_nodes)
    yield from devices.check(
        machine,
        wanted=needs.gpu,
        num_wanted=needs.ranks_per_node if needs.gpu else 0,
        num_ranks=here,
        has_scheduler=job.has_scheduler and not job.job,
    )
    at("the network")
    connected = network.collect(environment.network_settings(), job.hosts)
    yield from network.check(connected, backend=backend, num_nodes=num_nodes)
    at("the disk")
    yield from disk.check(file_system.collect(root), needs, job.seconds_left)
    at("limits and clocks")
    yield from limits.check(
        limits.collect(),
        backend=backend,
        num_ranks=here,
        world=max(needs.world, here),
        host_bytes=needs.host_bytes,
        has_infiniband=bool(connected.infiniband),
    )
    yield from clocks.check(clocks.collect(), num_nodes)
    if "torch" in packages.versions:
        at(f"collectives of {tried} ranks")
        tried = min(tried, len(machine.devices) or tried)
        yield from smoke.judge(smoke.launch(tried), _link(machine))
    if num_nodes > 1:
        yield _elsewhere(num_nodes)


def _link(machine: devices.Machine) -> float | None:
    """Bandwidth between the GPUs here, of those that have figures."""
    name = machine.devices[0].name if machine.devices else ""
    return next((gpu.link_gb_per_s for gpu in GPUS.values() if gpu.label in name.split()), None)


def _elsewhere(num_nodes: int) -> Finding:
    return Finding(
        check="smoke.nodes",
        level=NOTE,
        what=f"this machine alone was looked at, of {num_nodes}",
        rule="collectives between machines and the clocks of the others were not tried",
        remedy="run mempar doctor on each (srun --ntasks-per-node=1 mempar doctor --json), and the ranks of the smoke "
        "test on all: torchrun ... -m mempar.tools.doctor.smoke_rank --reports DIR",
    )
