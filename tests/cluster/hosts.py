"""Hosts on one machine: a network, a host name and an sshd for each, and one more to submit from.

Every host is a network namespace and a UTS namespace; processes and files are shared, as a cluster's file system is.
All hang on a bridge that lies in the namespace of `submit`, so that nothing of it is seen outside:

    submit 10.77.0.1 --- br0 --- to-hostA ... eth0 hostA 10.77.0.11
                             --- to-hostB ... eth0 hostB 10.77.0.12

    hosts.run(["mempar", "launch", ...])            on the submit host, with this environment
    hosts.run(["hostname"], on="hostA")             there, without ssh
    [*hosts.ssh, "hostB", "hostname"]               what a launcher runs: ssh -F FILE hostB hostname
    hosts.hostfile(slots=2)                         a hostfile of all of them

A link is cut at the bridge's end, so that a host sees a lost carrier, as with a cable that is pulled.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from programs import PATH, need_programs, stop

SUBMIT = "submit"
INTERFACE = "eth0"
PORT = 2222
_NETWORK = "10.77.0"
_PREFIX = "mpt"
_NETNS, _NETNS_FILES = Path("/run/netns"), Path("/etc/netns")
_PACKAGES = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "hostname": "hostname",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
# What a busy machine may take for anything that is waited for.
_SETTLE_SECONDS = 20.0
_POLL_SECONDS = 0.02
# Of several at once in one session.
_numbers = itertools.count()


class Hosts:
    """Some hosts, from `with Hosts(...)` on until its end.

    Attributes:
        names: hostA, hostB, ...
        addresses: by name, `submit` too.
        directory: what all this is kept in.
        ssh: the command that reaches a host from `submit`; a name and a command follow.
        ssh_options: those of them that go into a launch profile.
        was_left: what the tests left running, as `close` found it.
    """

    def __init__(self, count: int = 2) -> None:
        self.names = tuple(f"host{chr(ord('A') + index)}" for index in range(count))
        self.addresses = {SUBMIT: f"{_NETWORK}.1"}
        self.addresses |= {name: f"{_NETWORK}.{11 + index}" for index, name in enumerate(self.names)}
        self.was_left: list[str] = []
        self._tag = f"{_PREFIX}{os.getpid()}-{next(_numbers)}-"
        self._started: list[subprocess.Popen[str]] = []
        self._daemons: dict[str, subprocess.Popen[str]] = {}
        self._inodes: set[int] = set()

    def __enter__(self) -> "Hosts":
        self._programs = need_programs(_PACKAGES)
        remove_strays()
        # Its name tells a later session whose it was.
        self.directory = Path(tempfile.mkdtemp(prefix=self._tag))
        self.ssh_config = self.directory / "ssh_config"
        self.ssh_options = ["-F", str(self.ssh_config)]
        self.ssh = [self._programs["ssh"], *self.ssh_options]
        try:
            self._make_network()
            self._make_keys()
            for name in self.names:
                self.start_sshd(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, command: Sequence[str], *, on: str = SUBMIT, timeout: float = 60.0, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, without ssh, and wait for it; `options` are subprocess's."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        done = subprocess.run(self._there(command, on), timeout=timeout, check=False, text=True, **options)
        if check and done.returncode:
            said = f"{done.stdout or ''}{done.stderr or ''}"
            raise AssertionError(f"{shlex.join(command)} on {on} ended with status {done.returncode}:\n{said}")
        return done

    def start(self, command: Sequence[str], *, on: str = SUBMIT, **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host, without ssh; its pid is the command's own, so that signals reach it."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        self._started.append(subprocess.Popen(self._there(command, on), text=True, **options))
        return self._started[-1]

    def hostfile(self, slots: int = 1, names: Sequence[str] = ()) -> Path:
        """Write a hostfile, of all hosts unless some are named."""
        path = self.directory / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def processes(self, name: str, *, with_sshd: bool = False) -> dict[int, str]:
        """What runs on a host: command lines by pid, sshd's own only if asked for."""
        found = {}
        for word in self._ip("netns", "pids", self._netns(name)).split():
            with contextlib.suppress(OSError):
                what = Path(f"/proc/{word}/comm").read_text().strip()
                line = Path(f"/proc/{word}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
                # A zombie has no command line: it is gone, and only its parent has not looked.
                if line and (with_sshd or not what.startswith("sshd")):
                    found[int(word)] = line
        return found

    def wait_until_idle(self, seconds: float = _SETTLE_SECONDS, names: Sequence[str] = ()) -> list[str]:
        """Wait until nothing runs on hosts but sshd; returns what still does, as `hostA: command line`."""
        names = names or (SUBMIT, *self.names)
        left: list[str] = []

        def looked() -> bool:
            left[:] = [f"{name}: {line}" for name in names for line in self.processes(name).values()]
            return not left

        wait_for(looked, seconds)
        return left

    def kill_sshd(self, name: str) -> None:
        """Kill a host's sshd, with the processes of its connections; what they run stays."""
        for _ in range(100):
            every, others = self.processes(name, with_sshd=True), self.processes(name)
            if not (pids := every.keys() - others.keys()):
                break
            _kill(pids)
            # Reaped here, or it stays as a zombie.
            if daemon := self._daemons.pop(name, None):
                daemon.wait()
            time.sleep(_POLL_SECONDS)
        else:
            raise AssertionError(f"sshd of {name} does not end: {pids}")

    def start_sshd(self, name: str) -> None:
        """Start a host's sshd and wait until it listens."""
        pid_file, log = self.directory / f"{name}.pid", self.directory / f"{name}.log"
        pid_file.unlink(missing_ok=True)
        command = [self._programs["sshd"], "-D", "-f", str(self.directory / "sshd_config"), "-E", str(log)]
        daemon = self.start(
            [*command, "-o", f"PidFile={pid_file}"], on=name, stdout=subprocess.DEVNULL, env={"PATH": PATH}
        )
        self._daemons[name] = daemon
        if not wait_for(lambda: pid_file.exists() or daemon.poll() is not None) or daemon.poll() is not None:
            said = log.read_text().strip().splitlines() if log.exists() else []
            stop(f"sshd of {name} does not start: {said[-1] if said else 'it says nothing'}")

    def drop_link(self, name: str) -> None:
        """Pull a host's cable."""
        self._ip("-n", self._netns(SUBMIT), "link", "set", f"to-{name}", "down")

    def restore_link(self, name: str) -> None:
        """Put it back."""
        self._ip("-n", self._netns(SUBMIT), "link", "set", f"to-{name}", "up")

    def close(self) -> None:
        """End whatever runs on the hosts, and remove all that was made."""
        made = [name for name in (SUBMIT, *self.names) if (_NETNS / self._netns(name)).exists()]
        self.was_left = [f"{name}: {line}" for name in made for line in self.processes(name).values()]
        _empty([self._netns(name) for name in made])
        for process in self._started:
            process.wait()
            # What the test did not read.
            if process.stdout:
                process.stdout.close()
        _remove(self._tag)
        # The kernel takes a namespace down a moment after its name.
        wait_for(lambda: not self.leftovers())

    def leftovers(self) -> list[str]:
        """What there still is of all this: processes, namespaces with their links, files."""
        found = [f"{_NETNS / name}" for name in _of_session(_NETNS, self._tag)]
        found += [f"{_NETNS_FILES / name}" for name in _of_session(_NETNS_FILES, self._tag)]
        found += [f"{tempfile.gettempdir()}/{name}" for name in _of_session(Path(tempfile.gettempdir()), self._tag)]
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # A namespace without name lives on, with its links, as long as a process is in it.
                if (directory / "ns" / "net").stat().st_ino in self._inodes:
                    found.append(f"process {directory.name}: {(directory / 'comm').read_text().strip()}")
        return found

    def _netns(self, name: str) -> str:
        return f"{self._tag}{name}"

    def _ip(self, *words: str) -> str:
        done = subprocess.run([self._programs["ip"], *words], capture_output=True, text=True, check=False)
        if done.returncode:
            stop(
                f"`ip {' '.join(words)}` failed ({done.stderr.strip()}); hosts on one machine need network namespaces."
            )
        return done.stdout

    def _there(self, command: Sequence[str], on: str) -> list[str]:
        # Each of them executes the next one, so that the process stays the same.
        enter = [self._programs["ip"], "netns", "exec", self._netns(on), self._programs["unshare"], "--uts"]
        return [*enter, "sh", "-c", f'{self._programs["hostname"]} "$0" && exec "$@"', on, *command]

    def _make_network(self) -> None:
        table = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        for name in self.addresses:
            # `ip netns exec` shows these in place of /etc's.
            files = _NETNS_FILES / self._netns(name)
            files.mkdir(parents=True)
            (files / "hosts").write_text(table)
            self._ip("netns", "add", self._netns(name))
            self._inodes.add((_NETNS / self._netns(name)).stat().st_ino)
            self._ip("-n", self._netns(name), "link", "set", "lo", "up")
        submit = ("-n", self._netns(SUBMIT))
        self._ip(*submit, "link", "add", "br0", "type", "bridge")
        self._ip(*submit, "addr", "add", f"{self.addresses[SUBMIT]}/24", "dev", "br0")
        self._ip(*submit, "link", "set", "br0", "up")
        for name in self.names:
            ends = ("name", f"to-{name}", "type", "veth", "peer", "name", INTERFACE, "netns", self._netns(name))
            self._ip(*submit, "link", "add", *ends)
            self._ip(*submit, "link", "set", f"to-{name}", "master", "br0", "up")
            there = ("-n", self._netns(name))
            self._ip(*there, "addr", "add", f"{self.addresses[name]}/24", "dev", INTERFACE)
            self._ip(*there, "link", "set", INTERFACE, "up")

    def _make_keys(self) -> None:
        host_key, client_key = self.directory / "host_key", self.directory / "client_key"
        for key in (host_key, client_key):
            command = [self._programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(key)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        known = self.directory / "known_hosts"
        known.write_text(f"* {host_key.with_suffix('.pub').read_text()}")
        # Of the installation: its service would make it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        server = {
            "Port": str(PORT),
            "HostKey": str(host_key),
            "AuthorizedKeysFile": str(client_key.with_suffix(".pub")),
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "StrictModes": "no",
            # Without it sshd refuses an account without password that is locked, as root's often is.
            "UsePAM": "yes" if _root_is_locked() else "no",
            "UseDNS": "no",
            "PermitUserRC": "no",
            "PrintMotd": "no",
        }
        client = {
            "Port": str(PORT),
            "User": "root",
            "IdentityFile": str(client_key),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
        }
        (self.directory / "sshd_config").write_text(_settings(server))
        self.ssh_config.write_text(_settings(client))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts; the test fails when it leaves processes on them, or they leave anything behind."""
    with Hosts() as made:
        yield made
        made.wait_until_idle()
    assert not made.was_left, f"left running: {made.was_left}"
    assert not made.leftovers()


def wait_for(condition: Callable[[], bool], seconds: float = _SETTLE_SECONDS) -> bool:
    """Wait until something holds; returns whether it does."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def remove_strays() -> None:
    """Remove what sessions left that were killed."""
    for name in _of_session(_NETNS, _PREFIX) + _of_session(Path(tempfile.gettempdir()), _PREFIX):
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            tag = f"{_PREFIX}{pid}-"
            _empty(_of_session(_NETNS, tag))
            _remove(tag)


def _of_session(directory: Path, tag: str) -> list[str]:
    return sorted(path.name for path in directory.glob(f"{tag}*"))


def _pids(netns: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def _empty(namespaces: Sequence[str]) -> None:
    """Kill all that runs in namespaces."""

    def emptied() -> bool:
        pids = [pid for netns in namespaces for pid in _pids(netns)]
        _kill(pids)
        return not pids

    wait_for(emptied)


def _remove(tag: str) -> None:
    """Remove namespaces, which take their links with them, and files."""
    for netns in _of_session(_NETNS, tag):
        subprocess.run(["ip", "netns", "del", netns], check=False, capture_output=True)
    for directory in (_NETNS_FILES, Path(tempfile.gettempdir())):
        for name in _of_session(directory, tag):
            shutil.rmtree(directory / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        # Not there on a machine that makes no use of it.
        _NETNS_FILES.rmdir()


def _kill(pids: Sequence[int] | set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _settings(values: Mapping[str, str]) -> str:
    return "".join(f"{name} {value}\n" for name, value in values.items())


def _root_is_locked() -> bool:
    lines = Path("/etc/shadow").read_text().splitlines()
    return any(line.startswith("root:!") for line in lines)
