"""Whether every host can be used: ssh gets there without a person, and finds there what a run needs.

Asked before anything starts, of all hosts side by side, so that one message names all that are wrong. It says nothing
about what may change afterwards.
"""

import math
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError
from mempar.tools.launch.hostfile import Host, check_host_name

_MOST_THREADS = 32
# ssh's own failures, as its manual has it; any other status is the remote command's.
_OF_SSH = 255
_MOST_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """Why a host cannot be used; `is_ssh` tells what did not get there from what got there in vain."""

    host: str
    text: str
    is_ssh: bool


def check_reachable(
    hosts: Sequence[Host], ssh: Sequence[str], timeout: float, *, directory: Path | None = None, python: str = ""
) -> None:
    """Run a command on every host through ssh, at most 32 at once.

    Args:
        hosts: to reach.
        ssh: the command and its options, such as `["ssh", "-F", "config"]`; what they say comes before what is added
            here: that ssh asks no questions, and how long it tries.
        timeout: seconds that a host gets.
        directory: one that must be there and writable, such as a run's; nothing looks whether it is the same.
        python: an interpreter that must be there; a name or a path.

    Raises:
        ConfigError: when there is no ssh, or hosts cannot be used; the message lists them all.
    """
    for host in hosts:
        check_host_name(host.name, "hosts")
    command = _remote_command(directory, python)
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, math.ceil(timeout))}"]

    def look(host: Host) -> _Trouble | None:
        return _look(host.name, [*ssh, *options, host.name, command], timeout)

    with ThreadPoolExecutor(min(_MOST_THREADS, max(1, len(hosts)))) as pool:
        found = [trouble for trouble in pool.map(look, hosts) if trouble]
    if found:
        raise ConfigError(_message(found, len(hosts), ssh))


def _remote_command(directory: Path | None, python: str) -> str:
    """One line of sh, whatever shell the account has; it ends at the first that is missing."""
    steps = []
    if directory is not None:
        # Commands of ssh start elsewhere.
        directory = directory.absolute()
        quoted = shlex.quote(str(directory))
        steps.append(f"test -d {quoted} || {_say(f'directory {directory} is not there')}")
        steps.append(f"test -w {quoted} || {_say(f'directory {directory} cannot be written')}")
    if python:
        # A name alone is looked for in the PATH of commands that ssh runs.
        steps.append(f"command -v {shlex.quote(python)} >/dev/null || {_say(f'Python {python} is not there')}")
    return f"sh -c {shlex.quote('; '.join(steps))}" if steps else "true"


def _say(text: str) -> str:
    return f"{{ echo {shlex.quote(text)} >&2; exit 1; }}"


def _look(name: str, command: Sequence[str], timeout: float) -> _Trouble | None:
    # A file, for a pipe stays open as long as anything that ssh leaves behind, such as the master of a connection that
    # others share.
    with tempfile.TemporaryFile() as said:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return _Trouble(host=name, text=f"no answer in {timeout:g} s", is_ssh=True)
        except OSError as error:
            raise ConfigError(
                f"'{command[0]}' cannot be run ({error.strerror}); hosts are reached through OpenSSH; install its "
                "client, or give the path of ssh in the launch profile."
            ) from None
        if done.returncode == 0:
            return None
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    # What a host says ends up on a terminal.
    text = "".join(sign for sign in lines[-1].strip() if sign.isprintable()) if lines else ""
    text = text[:_MOST_CHARACTERS] or f"ended with status {done.returncode}"
    return _Trouble(host=name, text=text, is_ssh=done.returncode == _OF_SSH)


def _message(found: Sequence[_Trouble], num_hosts: int, ssh: Sequence[str]) -> str:
    wrong = "\n".join(f"  {trouble.host}: {trouble.text}" for trouble in found)
    remedies = []
    if first := next((trouble.host for trouble in found if trouble.is_ssh), ""):
        command = shlex.join([*ssh, first, "true"])
        remedies.append(f"see that `{command}` works without a question (network, sshd, keys, known_hosts)")
    if any(not trouble.is_ssh for trouble in found):
        remedies.append("put the run on a file system that all hosts have, with the same Python")
    return (
        f"{len(found)} of {num_hosts} hosts cannot be used:\n{wrong}\n"
        "every host of a run must answer ssh and have the run's directory and Python; "
        f"{'; '.join(remedies)}; or take the hosts out."
    )
