"""A run as a SLURM job: the batch script, and handing it to sbatch.

One task a node, which is the node's agent (mempar.runtime.launch.node); it reads its number and the node's name from
SLURM's variables there. `render` writes all that is submitted, so that a dry run shows exactly that.
"""

import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.tools.launch.places import FIRST_PORT, NUM_PORTS
from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.slurm_script import BODY

AGENT = "mempar.runtime.launch.node"
# sbatch's variables that are not named as its options are.
_VARIABLES = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE"}
# `module` is a function of login shells, which a batch script is not.
_MODULE = """\
if ! command -v module >/dev/null; then
  # shellcheck source=/dev/null
  source /etc/profile || true
fi"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A run on some nodes.

    Attributes:
        name: the job's.
        run_dir: the run's directory, on a file system that all nodes share.
        num_nodes: of the allocation.
        ranks_per_node: that each agent starts.
        gpus_per_node: that are asked for; 0 for none.
        profile: of the cluster, with flags.
        workdir: where the command was given; the profile's comes before it.
        max_restarts: after failures.
        port: of the rendezvous on the first node; None makes one of the job's number.
        agent: module that runs on every node.
    """

    name: str
    run_dir: Path
    num_nodes: int
    ranks_per_node: int
    gpus_per_node: int
    profile: LaunchProfile
    workdir: Path
    max_restarts: int = 0
    port: int | None = None
    agent: str = AGENT

    def __post_init__(self) -> None:
        """Check what the profile cannot."""
        if self.max_restarts and not self.profile.slurm.requeue:
            raise ConfigError(
                f"--max-restarts {self.max_restarts} with slurm.requeue off: SLURM restarts a job by queueing it "
                "again; turn slurm.requeue on in the profile, or leave --max-restarts out."
            )
        if not f"{self.name}{self.run_dir}{self.workdir}".isprintable():
            raise ConfigError(
                f"{str(self.run_dir)!r} or the run's name, {self.name!r}, holds characters that are not printable; a "
                "batch script could not hold them; choose another --out or name."
            )


def render(job: SlurmJob) -> str:
    """The batch script."""
    profile = job.profile
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(job)), ""]
    lines += ["# Written by `mempar launch`; what the run came from lies beside it.", "set -euo pipefail", ""]
    settings = {
        "run_dir": str(job.run_dir),
        "max_restarts": str(job.max_restarts),
        "requeue": "yes" if profile.slurm.requeue else "no",
    }
    lines += [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    lines += [f"port={job.port or f'$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))'}"]
    lines += [
        _array("srun_options", ["--label", *srun_options(profile, job.num_nodes, job.run_dir)]),
        _array("agent", _agent(job)),
        "",
    ]
    site = [_MODULE, f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    site += profile.setup
    # What sites provide reads variables that may not be set.
    lines += ["set +u", *site, "set -u", ""] if site else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    return "\n".join(lines) + BODY


def options(job: SlurmJob) -> list[str]:
    """Options of sbatch, as they stand in the script."""
    slurm = job.profile.slurm
    texts = {
        "job-name": job.name,
        **allocation_options(job.profile, job.num_nodes, job.gpus_per_node),
        "chdir": job.profile.workdir or str(job.workdir),
        # A percent sign begins a pattern.
        "output": f"{str(job.run_dir).replace('%', '%%')}/launch/slurm-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
    }
    # sbatch reads quotes in a script's lines as a shell does.
    written = [f"--{name}={shlex.quote(value)}" for name, value in texts.items() if value]
    written += ["--exclusive"] if slurm.exclusive else []
    return [*written, "--requeue" if slurm.requeue else "--no-requeue", *slurm.extra]


def allocation_options(profile: LaunchProfile, num_nodes: int, gpus_per_node: int) -> dict[str, str]:
    """Options that say which nodes are wanted, by name, as sbatch and srun take them; empty ones are not given."""
    slurm = profile.slurm
    gpus = str(gpus_per_node) if gpus_per_node else ""
    return {
        "nodes": str(num_nodes),
        "ntasks-per-node": "1",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "gres": f"gpu:{gpus}" if gpus and slurm.gpu_option == "gres" else "",
        "gpus-per-node": gpus if slurm.gpu_option == "gpus-per-node" else "",
        "cpus-per-task": str(slurm.cpus_per_task or ""),
        "mem": slurm.mem or ("0" if slurm.exclusive else ""),
    }


def submit(script: Path, environ: Mapping[str, str]) -> str:
    """Hand a script to sbatch.

    Args:
        script: as rendered.
        environ: this process's variables; sbatch would let some of them override what the script says, and those are
            left out.

    Returns:
        The job's number.

    Raises:
        ConfigError: when there is no sbatch here, or it refuses the job.
    """
    named = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    overriding = {_VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}") for name in named}
    overriding |= {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"}
    kept = {name: value for name, value in environ.items() if name not in overriding}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], env=kept, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            "there is no sbatch on this machine; --on slurm submits through it; go where jobs are submitted, or use "
            "--on ssh; --dry-run shows what would be submitted."
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ConfigError(
            f"SLURM refuses the job ({said}); its partition, account, limits and nodes must allow it; change the "
            f"launch profile or the flags; the script is {script}."
        )
    # With several clusters the cluster's name follows.
    return done.stdout.strip().partition(";")[0]


def srun_options(profile: LaunchProfile, num_nodes: int, shared: Path) -> list[str]:
    """Options of srun for one task a node.

    Args:
        profile: of the cluster, with flags.
        num_nodes: of the allocation.
        shared: directory that a container is to see.
    """
    slurm = profile.slurm
    given = [
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes}",
        "--ntasks-per-node=1",
        "--export=ALL",
        # The agent's ranks use all of the node's CPUs, and talk to one another without MPI.
        "--cpu-bind=none",
        "--mpi=none",
        # One node's failure ends all; one that is done waits for the others.
        "--kill-on-bad-exit=1",
        "--wait=0",
    ]
    if slurm.container_image:
        mounts = [*slurm.container_mounts, f"{shared}:{shared}"]
        given += [f"--container-image={slurm.container_image}", f"--container-mounts={','.join(mounts)}"]
        given += [f"--container-workdir={slurm.container_workdir}"] if slurm.container_workdir else []
    return given


def _agent(job: SlurmJob) -> list[str]:
    command = [job.profile.interpreter, "-m", job.agent, str(job.run_dir)]
    command += ["--nodes", str(job.num_nodes), "--nproc", str(job.ranks_per_node)]
    return [*command, "--patience", str(job.profile.rendezvous_seconds)]


def _array(name: str, values: Iterable[str]) -> str:
    # A bare comma would look like a mistake to shellcheck.
    quoted = (f"'{value}'" if "," in value and shlex.quote(value) == value else shlex.quote(value) for value in values)
    return "\n  ".join([f"{name}=(", *quoted]) + "\n)"
