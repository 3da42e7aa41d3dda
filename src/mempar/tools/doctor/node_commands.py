"""The commands that reach nodes: ssh to each host, or one srun for all of them."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.node_shell import in_shell
from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.slurm import allocation_options, srun_options
from mempar.tools.launch.ssh import ssh_command

_NODE = "mempar.tools.doctor.node"


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """A command that reaches some nodes.

    Attributes:
        words: of it.
        node_ranks: numbers of the nodes.
        is_queued: whether it may wait for them as long as it takes.
    """

    words: tuple[str, ...]
    node_ranks: tuple[int, ...]
    is_queued: bool = False


def ssh_commands(profile: LaunchProfile, hosts: tuple[Host, ...], workdir: Path) -> list[NodeCommand]:
    """One connection a host."""
    commands = []
    for rank, host in enumerate(hosts):
        node = [profile.interpreter, "-m", _NODE, "--node-rank", str(rank), "--node", host.name]
        # One word for the account's shell, whichever it is.
        remote = f"exec {shlex.join(in_shell(profile, workdir, node))}"
        commands.append(NodeCommand(words=(*ssh_command(profile), host.name, remote), node_ranks=(rank,)))
    return commands


def srun_command(
    profile: LaunchProfile, num_nodes: int, gpus_per_node: int, workdir: Path, shared: Path, *, in_job: bool
) -> NodeCommand:
    """One task a node, in the job that this process runs in, or in one that srun makes.

    Args:
        profile: of the cluster, with flags.
        num_nodes: how many.
        gpus_per_node: to ask for; 0 for none.
        workdir: where the command was given.
        shared: directory that nodes are to see.
        in_job: whether there is a job to use.
    """
    options = [*srun_options(profile, num_nodes, shared)]
    # What is wrong with one node is found out on all.
    options += ["--kill-on-bad-exit=0"]
    # Beside whatever the job runs, and with all that it has.
    options += ["--overlap"] if in_job else _allocation(profile, num_nodes, gpus_per_node)
    node = [profile.interpreter, "-m", _NODE]
    if profile.slurm.container_image:
        # As a batch script does: modules are outside of the container.
        words = in_shell(profile, workdir, ["srun", *options, *node])
    else:
        words = ["srun", *options, *in_shell(profile, workdir, node)]
    return NodeCommand(words=tuple(words), node_ranks=tuple(range(num_nodes)), is_queued=not in_job)


def _allocation(profile: LaunchProfile, num_nodes: int, gpus_per_node: int) -> list[str]:
    texts = {"job-name": "mempar-doctor", **allocation_options(profile, num_nodes, gpus_per_node)}
    exclusive = ["--exclusive"] if profile.slurm.exclusive else []
    return [*(f"--{name}={value}" for name, value in texts.items() if value), *exclusive, *profile.slurm.extra]
