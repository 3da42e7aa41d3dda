"""A launch over plain OpenSSH: one connection a host, and at its other end an agent that lives no longer than it.

The launcher writes beats and signals to the agents, shows what they write with their host's name before it, and ends
all when one is lost: the others get a while to end by themselves, since they know why they fail.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError, MemparError
from mempar.runtime.launch import words
from mempar.runtime.launch.stopping import heed_signals
from mempar.tools.launch.connection import Connection
from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.node_shell import in_shell
from mempar.tools.launch.profile import LaunchProfile

# What agents get to end by themselves when one host failed: longer than they take to find out why; and when one refused
# bad input, which the others cannot know.
_GRACE_SECONDS, _REFUSED_GRACE_SECONDS = 30.0, 3.0
# For connections to be closed once their agents were told to end at once.
_LEAVE_SECONDS = 10.0
_POLL_SECONDS = 0.1
# ssh's own failures, as its manual has it.
_OF_SSH = 255
# A connection of its own: one that others share may lack these, and ssh would leave its master behind, with our pipes.
_ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3", "ControlPath=none")


@dataclass(frozen=True, kw_only=True)
class SshLaunch:
    """What is started on every host.

    Attributes:
        hosts: the first one is the head; each takes as many ranks as it has slots.
        run_dir: the run's directory, the same on all hosts.
        workdir: where the command was given; the profile's comes before it.
        profile: of the cluster, with flags.
        port: of the rendezvous on the head.
        attempt: names this start of the run.
    """

    hosts: tuple[Host, ...]
    run_dir: Path
    workdir: Path
    profile: LaunchProfile
    port: int
    attempt: str


def ssh_command(profile: LaunchProfile) -> list[str]:
    """The command and its options, up to the host's name."""
    ssh = profile.ssh
    given = {"-F": ssh.config, "-l": ssh.user, "-p": str(ssh.port or ""), "-i": ssh.identity}
    command = ["ssh", *(word for option, value in given.items() if value for word in (option, value))]
    options = (*ssh.options, "BatchMode=yes", f"ConnectTimeout={ssh.connect_timeout}", *_ALIVE)
    return [*command, "-T", *(word for option in options for word in ("-o", option))]


def commands(launch: SshLaunch) -> list[list[str]]:
    """One command for every host, as they are run."""
    return [[*ssh_command(launch.profile), host.name, _remote(launch, rank)] for rank, host in enumerate(launch.hosts)]


def run_over_ssh(
    launch: SshLaunch, say: Callable[[str], None], heard: Callable[[str], None] = lambda word: None
) -> None:
    """Start the agents and wait for them; must be called in the main thread.

    SIGTERM and SIGINT let the run save and end, and this function return; a second SIGINT ends it at once.

    Args:
        launch: what is started.
        say: prints a line.
        heard: told of every such signal, by its name.

    Raises:
        MemparError: when the run failed, with the one message.
        KeyboardInterrupt: at the second SIGINT.
    """
    agents = [_Agent(host.name, command, say) for host, command in zip(launch.hosts, commands(launch), strict=True)]
    watch = _Watch(agents)

    def wish(word: str) -> None:
        heard(word)
        watch.tell(word)

    with heed_signals(wish, watch.end_now):
        try:
            watch.until_all_ended()
        finally:
            for agent in agents:
                agent.close()
    if watch.interrupted:
        raise KeyboardInterrupt
    error = _verdict(agents)
    if error is not None:
        raise error


def _remote(launch: SshLaunch, rank: int) -> str:
    """One word for the account's shell, whichever it is."""
    profile, head = launch.profile, launch.hosts[0]
    agent = [profile.interpreter, "-m", "mempar.runtime.launch.node", str(launch.run_dir)]
    agent += ["--nodes", str(len(launch.hosts)), "--nproc", str(head.slots), "--node-rank", str(rank)]
    agent += ["--node", launch.hosts[rank].name, "--rendezvous", f"{head.name}:{launch.port}"]
    agent += ["--attempt", launch.attempt, "--patience", str(profile.rendezvous_seconds), "--stdin"]
    return f"exec {shlex.join(in_shell(profile, launch.workdir, agent))}"


class _Agent:
    """A host's agent, at the other end of a connection."""

    def __init__(self, host: str, command: Sequence[str], say: Callable[[str], None]) -> None:
        self.host, self._say = host, say
        self.error: MemparError | None = None
        self.was_told_to_end, self._verdict_at = False, 0.0
        self.last_line = ""
        self._connection = Connection(command, self._hear)
        self.tell, self.close = self._connection.tell, self._connection.close

    @property
    def status(self) -> int | None:
        """Of the connection; None while it lasts."""
        return self._connection.status

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes: sshd keeps a connection open for whatever else was started there and writes."""
        is_over = self.has_verdict and time.monotonic() - self._verdict_at > _LEAVE_SECONDS
        return is_over or self.status is not None

    @property
    def has_verdict(self) -> bool:
        """Whether it said how its part ended."""
        return self._verdict_at > 0.0

    @property
    def has_failed(self) -> bool:
        """Whether it ended, or will, but not well; an agent that ends well says so, which may still be on its way."""
        if self.has_verdict:
            return self.error is not None
        return bool(self.status) or (self.status == 0 and self._connection.is_heard)

    @property
    def has_refused(self) -> bool:
        """Whether it says that the input is bad."""
        return self.error is not None and self.error.exit_status == ConfigError.exit_status

    def _hear(self, line: str) -> None:
        is_verdict, error = words.hear_verdict(line)
        if is_verdict:
            self.error, self._verdict_at = error, time.monotonic()
        elif line:
            self.last_line = line
            # Whether or not anybody still takes it: an agent that cannot write does not go on.
            with contextlib.suppress(OSError):
                self._say(f"[{self.host}] {line}")


class _Watch:
    """The launcher's side of all connections."""

    def __init__(self, agents: list[_Agent]) -> None:
        self.interrupted = False
        self._agents = agents
        self._wishes: list[str] = []

    def tell(self, word: str) -> None:
        """Pass a signal on; may be called in a signal's handler."""
        self._wishes.append(word)

    def end_now(self) -> None:
        """End all at once; may be called in a signal's handler."""
        self.interrupted = True

    def until_all_ended(self) -> None:
        """Beat, pass on, and see the agents end."""
        beaten, failed_at, told_to_end = 0.0, 0.0, 0.0
        while running := [agent for agent in self._agents if not agent.has_ended]:
            now = time.monotonic()
            said = [self._wishes.pop(0) for _ in range(len(self._wishes))]
            if now - beaten > words.BEAT_SECONDS:
                beaten = now
                said.append(words.BEAT)
            if not failed_at and any(agent.has_failed for agent in self._agents):
                failed_at = now
            grace = _REFUSED_GRACE_SECONDS if any(agent.has_refused for agent in self._agents) else _GRACE_SECONDS
            if not told_to_end and (self.interrupted or (failed_at and now - failed_at > grace)):
                told_to_end = now
                said.append(words.KILL)
                for agent in running:
                    agent.was_told_to_end = True
            for word in said:
                for agent in running:
                    agent.tell(word)
            if told_to_end and now - told_to_end > _LEAVE_SECONDS:
                return
            time.sleep(_POLL_SECONDS)


def _verdict(agents: list[_Agent]) -> MemparError | None:
    """What the run came to: the head speaks for all, unless it is lost, or another host could not begin."""
    head = agents[0]
    failed = [agent for agent in agents if agent.error is not None or not agent.has_verdict]
    if not failed:
        return None
    refused = [agent for agent in agents if agent.has_refused]
    silent = [agent for agent in agents if not agent.has_verdict and not agent.was_told_to_end]
    if refused:
        return refused[0].error
    # What ends otherwise than by a failure of ssh, or a signal to it, was reached.
    lost = [agent for agent in silent if agent.status is not None and (agent.status < 0 or agent.status == _OF_SSH)]
    if lost:
        names = ", ".join(agent.host for agent in lost)
        own = [agent for agent in lost if agent.status == _OF_SSH and agent.last_line]
        why = f" (ssh: {own[0].last_line})" if own else ""
        return MemparError(
            f"the connection to {names} was lost{why}, and the ranks there have ended with it; a run cannot go on "
            "without one of its hosts; see whether it is up and reached, and continue from the last checkpoint with "
            "--resume, or let --max-restarts do it."
        )
    if silent:
        names = ", ".join(f"{agent.host} (status {agent.status})" for agent in silent)
        last = next((agent.last_line for agent in silent if agent.last_line), "")
        return MemparError(
            f"the agent ended without a word on {names}{f', after: {last}' if last else ''}; every host needs the same "
            "Python with mempar, the directory in which the run is launched, and memory enough; see the output above, "
            "and continue with --resume."
        )
    told = [agent.error for agent in (head, *failed) if agent.error is not None]
    return (
        told[0] if told else MemparError(f"host {failed[0].host} ended with status {failed[0].status}; see its output.")
    )
