"""The shell on a node that brings what a profile says, and then becomes a command."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mempar.tools.launch.profile import LaunchProfile


def in_shell(profile: LaunchProfile, workdir: Path, command: Sequence[str]) -> list[str]:
    """The command in a shell with the profile's modules, setup and variables, in its directory.

    Args:
        profile: of the cluster, with flags.
        workdir: where the user's command was given; the profile's comes before it.
        command: what runs in the end, in the shell's place.
    """
    steps = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    # A comment, or an `||`, is of its own line alone.
    steps += [f"eval {shlex.quote(line)}" for line in profile.setup]
    steps += [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    steps += [f"cd {shlex.quote(profile.workdir or str(workdir))}", f"exec {shlex.join(command)}"]
    # `module` is a function of login shells.
    shell = ["bash", "-l", "-c"] if profile.modules else ["sh", "-c"]
    return [*shell, " && ".join(steps)]
