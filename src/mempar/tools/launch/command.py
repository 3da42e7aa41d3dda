"""`mempar launch`: resolve a recipe, check everything that can be checked, write the run's directory, start its nodes.

A dry run takes the same way up to the point where something would be written.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mempar.errors import ConfigError
from mempar.recipes import find_recipe
from mempar.runtime.config import RunConfig
from mempar.runtime.durable import replace_file
from mempar.runtime.estimate import check_fits
from mempar.runtime.launch.going_on import record_start, starting_point
from mempar.runtime.launch.local import run_node
from mempar.runtime.launch.lock import RunLock
from mempar.runtime.launch.nodes import this_host
from mempar.runtime.launch.stopping import Terminated, sigterm_raises
from mempar.runtime.launch.supervisor import Supervisor
from mempar.runtime.overrides import override
from mempar.runtime.preflight import check_layout
from mempar.runtime.run_dir import RunDir, check_same_run, open_existing, open_new
from mempar.tools.estimate_table import estimate_table
from mempar.tools.launch import slurm
from mempar.tools.launch.hostfile import Host, choose_hosts, read_hostfile
from mempar.tools.launch.nodes_wanted import nodes_wanted
from mempar.tools.launch.places import any_port, check_place
from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.provenance import save, take
from mempar.tools.launch.reach import check_reachable
from mempar.tools.launch.restarts import with_restarts
from mempar.tools.launch.ssh import SshLaunch, commands, run_over_ssh, ssh_command
from mempar.tools.run_start import find_checkpoint, nothing_to_continue, root_of, with_data

_SCRIPT = "job.sbatch"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        recipe: name, YAML file or module:function.
        assignments: `KEY=VALUE` overrides.
        place: one of `PLACES`.
        profile: of the cluster, with flags.
        flags: of the cluster, that were given.
        nodes: None takes what the recipe is laid out for, or all hosts.
        per_node: ranks of a node; None takes what the profile, the hosts or the recipe say.
        hostfile: of --on ssh.
        max_restarts: after failures.
        port: of the rendezvous on the head node; None chooses one.
        dry_run: show what would be started, and stop.
        out: the run's directory; None makes a fresh one under runs/.
        resume: continue the run in `out`.
        start_from: checkpoint to start a new run from.
    """

    recipe: str
    assignments: tuple[str, ...] = ()
    place: str
    profile: LaunchProfile
    flags: tuple[str, ...] = ()
    nodes: int | None = None
    per_node: int | None = None
    hostfile: Path | None = None
    max_restarts: int = 0
    port: int | None = None
    dry_run: bool = False
    out: Path | None = None
    resume: bool = False
    start_from: Path | None = None

    def __post_init__(self) -> None:
        """Check options against each other."""
        check_place(self.place, self.hostfile, self.flags)
        if self.max_restarts < 0:
            raise ConfigError(
                f"--max-restarts {self.max_restarts} is negative; it is a number of restarts; use 0 or more."
            )
        if self.port is not None and not 1024 <= self.port < 65536:
            raise ConfigError(
                f"--port {self.port} must be from 1024 to 65535, where anybody may listen; choose another."
            )


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """A request, resolved and checked."""

    request: Request
    run: RunConfig
    root: Path
    nodes: int
    per_node: int
    hosts: tuple[Host, ...]


def launch(request: Request, say: Callable[[str], None]) -> Path:
    """Launch a run; returns when it has ended, or under SLURM when the job is submitted.

    Returns:
        The run's directory.

    Raises:
        ConfigError: for bad input, before anything is written or started.
        MemparError: when the run failed.
    """
    made = _resolve(request, say)
    missing: ConfigError | None = None
    try:
        with sigterm_raises():
            # With --resume its ranks find out; here it is only looked whether they will.
            start_from = None if request.resume else request.start_from
            load = find_checkpoint(made.root, made.run, resume=False, start_from=start_from) if _is_new(made) else None
            try:
                made = replace(made, run=with_data(made.run, say))
            except ConfigError as error:
                if not request.dry_run:
                    raise
                missing = error
            if request.resume and _is_new(made):
                say(nothing_to_continue(made.root))
            elif not _is_new(made):
                check_same_run(made.root, made.run)
                starting_point(RunDir(made.root), made.run, say)
            if request.dry_run:
                _show(made, say)
            else:
                _check_place(made)
                _write(made, load and load.root, say)
    except Terminated:
        say("ended by SIGTERM before anything was started")
        return made.root
    if missing is not None:
        raise ConfigError(f"this launch would be refused: {missing}")
    if not request.dry_run:
        {"local": _start_here, "ssh": _start_over_ssh, "slurm": _submit}[request.place](made, say)
    return made.root


def _resolve(request: Request, say: Callable[[str], None]) -> _Launch:
    """Everything that follows from the request alone; nothing is looked at but the hostfile."""
    run = override(find_recipe(request.recipe), request.assignments)
    hosts: tuple[Host, ...] = ()
    if request.hostfile is not None:
        per_node = _per_node(request)
        hosts = choose_hosts(read_hostfile(request.hostfile), request.hostfile, nodes=request.nodes, per_node=per_node)
        nodes, per_node = len(hosts), hosts[0].slots
    else:
        nodes, per_node = nodes_wanted(
            run,
            nodes=request.nodes,
            per_node=_per_node(request),
            at_most=1 if request.place == "local" else None,
        )
    run = check_layout(run, nodes * per_node)
    say(f"{run.name}: {nodes} node(s) of {per_node} rank(s)")
    say(estimate_table(check_fits(run, nodes * per_node), run.hardware.kind))
    root = root_of(run, request.out, resume=request.resume, start_from=request.start_from)
    return _Launch(request=request, run=run, root=root, nodes=nodes, per_node=per_node, hosts=hosts)


def _per_node(request: Request) -> int | None:
    """Ranks of a node as asked for."""
    return request.profile.nproc_per_node if request.per_node is None else request.per_node


def _is_new(made: _Launch) -> bool:
    """Whether there is no run to continue, also where --resume would."""
    return not (made.request.resume and RunDir(made.root).config.exists())


def _check_place(made: _Launch) -> None:
    """Refuse where the run cannot be started, before anything is written."""
    profile = made.request.profile
    if made.request.place == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch on this machine; --on slurm submits through it; go where jobs are submitted, or use "
            "--on ssh; --dry-run shows what would be submitted."
        )
    if made.request.place == "ssh":
        there = next(path for path in (made.root, *made.root.parents) if path.is_dir())
        # What modules and setup lines bring is not there yet.
        python = "" if profile.modules or profile.setup else profile.interpreter
        timeout = float(profile.ssh.connect_timeout + 5)
        check_reachable(made.hosts, ssh_command(profile), timeout, directory=there, python=python)


def _write(made: _Launch, load: Path | None, say: Callable[[str], None]) -> None:
    """Write the run's directory: all that the nodes read, and what the run came from."""
    request = made.request
    origin = take(sys.argv, request.profile)
    with RunLock(made.root, say):
        new = _is_new(made)
        paths = open_existing(made.root, made.run) if request.resume else open_new(made.root, made.run)
        try:
            if new:
                _record_start(paths, load)
            save(origin, paths.launch)
            if request.place == "slurm":
                replace_file(paths.launch / _SCRIPT, slurm.render(_job(made)).encode())
        except OSError as error:
            raise ConfigError(
                f"{paths.launch} cannot be written ({error.strerror}); what a run came from is kept there; make room, "
                "or choose another --out."
            ) from None
    say(f"run directory: {made.root}")


def _record_start(paths: RunDir, load: Path | None) -> None:
    try:
        record_start(paths, load)
    except OSError:
        # Continued without it, the run would begin from nothing.
        paths.config.unlink()
        raise


def _start_here(made: _Launch, say: Callable[[str], None]) -> None:
    watching: list[Supervisor] = []

    def start(number: int) -> None:
        with RunLock(made.root, say):
            run_node(made.root, this_host(made.per_node), ["--go-on"], say, also=watching.append)

    with_restarts(start, made.request.max_restarts, say, lambda: any(one.is_told_to_end for one in watching))


def _start_over_ssh(made: _Launch, say: Callable[[str], None]) -> None:
    heard: list[str] = []

    def start(number: int) -> None:
        run_over_ssh(_ssh_launch(made, number), say, heard.append)

    with_restarts(start, made.request.max_restarts, say, lambda: bool(heard))


def _ssh_launch(made: _Launch, number: int) -> SshLaunch:
    return SshLaunch(
        hosts=made.hosts,
        run_dir=made.root,
        workdir=Path.cwd(),
        profile=made.request.profile,
        port=made.request.port or any_port(),
        attempt=f"{time.strftime('%Y%m%d-%H%M%S')}-{number}",
    )


def _submit(made: _Launch, say: Callable[[str], None]) -> None:
    script = RunDir(made.root).launch / _SCRIPT
    try:
        job = slurm.submit(script, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{error} Then launch again with --resume --out {made.root}.") from None
    say(f"job {job} is submitted; its output goes to {script.parent}/slurm-{job}.out")


def _job(made: _Launch) -> slurm.SlurmJob:
    request = made.request
    return slurm.SlurmJob(
        name=made.run.name,
        run_dir=made.root,
        num_nodes=made.nodes,
        ranks_per_node=made.per_node,
        gpus_per_node=made.per_node if made.run.hardware.gpu else 0,
        profile=request.profile,
        workdir=Path.cwd(),
        max_restarts=request.max_restarts,
        port=request.port,
    )


def _show(made: _Launch, say: Callable[[str], None]) -> None:
    """Print what would be started."""
    say(f"run directory: {made.root} (not written)")
    if made.request.place == "slurm":
        say(slurm.render(_job(made)).rstrip())
    elif made.request.place == "ssh":
        for command in commands(_ssh_launch(made, 0)):
            say(shlex.join(command))
    else:
        worker = [sys.executable, "-m", "mempar.runtime.launch.worker", str(made.root), "--go-on"]
        say(f"{made.per_node} x {shlex.join(worker)}")
