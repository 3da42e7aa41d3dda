"""`mempar doctor`: look at everything, say what was found, and whether a run would fail."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.overrides import override
from mempar.tools.doctor import environment, machine, smoke
from mempar.tools.doctor.finding import ERROR, NOTE, Finding, worst
from mempar.tools.doctor.looking import look
from mempar.tools.doctor.needs import Needs, needs_of
from mempar.tools.doctor.node_commands import srun_command, ssh_commands
from mempar.tools.doctor.report import show
from mempar.tools.doctor.together import Site, look_together
from mempar.tools.launch.hostfile import choose_hosts, read_hostfile
from mempar.tools.launch.places import any_port, check_place
from mempar.tools.launch.profile import LaunchProfile


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        recipe: name, YAML file or module:function; None for no run in particular.
        assignments: `KEY=VALUE` overrides.
        place: `local`, `ssh` or `slurm`.
        profile: of the cluster, with flags.
        nodes: None takes all hosts, the allocation's, or what the recipe is laid out for.
        hostfile: of --on ssh.
        out: directory that the run would have; `runs` by default.
        num_ranks: ranks of each node to try out; None for the profile's, one a GPU, or two.
        as_json: print a list of objects, and nothing else.
    """

    recipe: str | None = None
    assignments: tuple[str, ...] = ()
    place: str = "local"
    profile: LaunchProfile
    nodes: int | None = None
    hostfile: Path | None = None
    out: Path | None = None
    num_ranks: int | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        """Check options against each other."""
        check_place(self.place, self.hostfile)
        if self.num_ranks is not None and self.num_ranks < 1:
            raise ConfigError(
                f"--nproc {self.num_ranks} starts no rank; collectives are tried out on at least one; raise it."
            )
        if self.nodes is not None and self.nodes < 1:
            raise ConfigError(f"--nodes={self.nodes} must be at least 1; there is nothing else to look at; raise it.")
        if self.place == "local" and (self.nodes or 1) > 1:
            raise ConfigError(
                f"--nodes {self.nodes} with --on local: this machine is one; use --on ssh or --on slurm for more."
            )
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root} is a file; a run needs a directory; choose another --out.")
        if self.recipe is not None and "=" in self.recipe and not self.recipe.startswith(("/", ".")):
            raise ConfigError(
                f"'{self.recipe}' is no recipe; settings follow a recipe; write mempar doctor RECIPE {self.recipe}."
            )

    @property
    def root(self) -> Path:
        """Directory of the run."""
        return self.out or Path("runs")

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks of each node, as far as they are given."""
        return self.num_ranks or (None if self.place == "local" else self.profile.nproc_per_node)


def doctor(request: Request, say: Callable[[str], None]) -> int:
    """Look at this machine or at nodes, and at what a recipe wants of them.

    Args:
        request: what was asked for.
        say: prints a line.

    Returns:
        The exit status: 1 when a run would fail, else 0.

    Raises:
        ConfigError: for bad input.
    """
    run = override(find_recipe(request.recipe), list(request.assignments)) if request.recipe else None
    find = {"local": _look_here, "ssh": _look_over_ssh, "slurm": _look_in_slurm}[request.place]
    console = Console(stderr=True)
    with console.status("looking ...") as status:
        try:
            with sigterm_raises():
                findings = find(request, run, lambda what: status.update(f"looking at {what} ..."))
        except Terminated:
            # All that was started has ended by now.
            raise KeyboardInterrupt from None
    if request.as_json:
        say(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        show(findings, Console())
    return int(worst(findings) == ERROR)


def _look_here(request: Request, run: RunConfig | None, at: Callable[[str], None]) -> list[Finding]:
    needs = _needs(request, run, request.num_ranks, 1)
    seen = look(needs, request.root, request.num_ranks, at)
    findings = seen.findings
    if "torch" in seen.installed.versions:
        at(f"collectives of {seen.num_ranks} ranks")
        names = [device.name for device in seen.computer.devices]
        findings += smoke.judge(smoke.launch(seen.num_ranks), machine.link_gb_per_s(names))
    num_nodes = max(needs.num_nodes, environment.allocation().num_nodes)
    return [*findings, _elsewhere(num_nodes)] if num_nodes > 1 else findings


def _look_over_ssh(request: Request, run: RunConfig | None, at: Callable[[str], None]) -> list[Finding]:
    assert request.hostfile is not None
    hosts = choose_hosts(
        read_hostfile(request.hostfile), request.hostfile, nodes=request.nodes, per_node=request.ranks_per_node
    )
    names = tuple(host.name for host in hosts)
    site = Site(
        names=names,
        hosts=names,
        commands_for=lambda shared: ssh_commands(request.profile, hosts, Path.cwd()),
        address_of=lambda name: name,
        port=any_port(),
        wait_seconds=request.profile.ssh.connect_timeout,
    )
    per_node = hosts[0].slots
    return look_together(site, _needs(request, run, per_node, len(hosts)), request.root, per_node, at)


def _look_in_slurm(request: Request, run: RunConfig | None, at: Callable[[str], None]) -> list[Finding]:
    if shutil.which("srun") is None:
        raise ConfigError(
            "there is no srun on this machine; --on slurm reaches nodes through it; go where jobs are submitted, or "
            "use --on ssh."
        )
    job, per_node = environment.allocation(), request.ranks_per_node
    wanted = request.nodes or (job.num_nodes if job.job else None)
    if wanted is None and run is None:
        raise ConfigError(
            "--on slurm does not know how many nodes; there is no allocation around this command and no recipe; give "
            "--nodes."
        )
    if job.job and wanted is not None and wanted > job.num_nodes:
        raise ConfigError(
            f"--nodes {wanted}, but job {job.job} has {job.num_nodes}; inside an allocation its nodes are looked at; "
            "lower --nodes, or leave the allocation."
        )
    needs = _needs(request, run, per_node, wanted or 1)
    num_nodes = wanted or needs.num_nodes
    gpus = (per_node or needs.ranks_per_node) if needs.gpu else 0
    # Of a part of the nodes it is not known which ones they will be.
    known = job.hosts if len(job.hosts) == num_nodes else tuple(f"node {number}" for number in range(num_nodes))
    site = Site(
        names=known,
        hosts=(),
        commands_for=lambda shared: [
            srun_command(request.profile, num_nodes, gpus, Path.cwd(), shared, in_job=bool(job.job))
        ],
        address_of=environment.node_address,
        port=any_port(),
        wait_seconds=0.0,
    )
    return look_together(site, needs, request.root, per_node, at)


def _needs(request: Request, run: RunConfig | None, per_node: int | None, nodes: int) -> Needs:
    """What the run wants of so many nodes at the least."""
    needs = needs_of(run, request.root, per_node, nodes) if run else Needs()
    return replace(needs, num_nodes=max(needs.num_nodes, nodes))


def _elsewhere(num_nodes: int) -> Finding:
    return Finding(
        check="smoke.nodes",
        level=NOTE,
        what=f"this machine alone was looked at, of {num_nodes}",
        rule="collectives between machines and the clocks of the others were not tried",
        remedy="run mempar doctor --on slurm in the allocation, or --on ssh --hostfile FILE",
    )
