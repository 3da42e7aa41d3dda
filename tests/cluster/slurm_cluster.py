"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd of its own, in a directory of its own.

Nothing of the machine's own SLURM, if there is one, is used or touched: sockets, keys, ports and files are private, and
clients find the cluster through SLURM_CONF. Nodes that nobody runs stand beside the two, so that large jobs can be
checked with `sbatch --test-only`.

    slurm.run("squeue")                 a client's output
    slurm.job(number)                   what `scontrol show job` says, by name
    slurm.wait(number, "RUNNING")       until a job is in a state
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from programs import PATH, need_programs, stop

NODES = ("n1", "n2")
NUM_ABSENT = 512
# How long jobs get between SIGTERM and SIGKILL, and those in the partition `grace` before that when they are preempted.
KILL_WAIT_SECONDS, GRACE_SECONDS = 6, 12
_PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "shellcheck": "shellcheck",
}
# What a busy machine may take for anything that is waited for.
_SETTLE_SECONDS = 90.0
_POLL_SECONDS = 0.1
# Scripts make their ports of the numbers of jobs, so that two clusters on one machine must not count alike. A requeued
# job waits for the credential of its last start to expire (120 s by default), and 10 s at the least. Nodes in the cloud
# are not looked for until a job is given to them.
_CONF = f"""\
ClusterName=mempar
SlurmctldHost={{host}}(127.0.0.1)
SlurmctldPort={{ports[0]}}
FirstJobId={{first_job}}
AuthType=auth/munge
AuthInfo=socket={{root}}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={{root}}/state
SlurmdSpoolDir={{root}}/spool-%n
SlurmctldPidFile={{root}}/slurmctld.pid
SlurmdPidFile={{root}}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
GresTypes=gpu
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={KILL_WAIT_SECONDS}
ReturnToService=2
NodeName=n1 NodeHostname={{host}} NodeAddr=127.0.0.1 Port={{ports[1]}} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname={{host}} NodeAddr=127.0.0.1 Port={{ports[2]}} CPUs=4 RealMemory=1000
NodeName=absent[001-{NUM_ABSENT}] State=CLOUD CPUs=128 RealMemory=1000000 Gres=gpu:8
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}
PartitionName=high Nodes=n[1-2] PriorityTier=2 PreemptMode=OFF
PartitionName=large Nodes=absent[001-{NUM_ABSENT}]
"""


class SlurmCluster:
    """A cluster, from `with SlurmCluster()` on until its end.

    Attributes:
        environment: of clients.
    """

    def __init__(self) -> None:
        self._programs = need_programs(_PACKAGES)
        # Not pytest's directories: munged wants none that others may write to, and paths of sockets are short.
        self.root = Path(tempfile.mkdtemp(prefix="mempar-slurm-"))
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmCluster":
        """Start everything, and wait until both nodes are idle."""
        try:
            self._write_files()
            munge = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
            files = [f"--{option}={self.root}/munge.{ending}" for option, ending in munge.items()]
            self._start("munged", "--foreground", "--force", "--num-threads=2", *files)
            self.until((self.root / "munge.socket").exists, "munged's socket")
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self.until(self._are_idle, "two idle nodes")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything; nothing may be left."""
        left = self._end()
        assert kind or not left, f"left running by SLURM: {left}"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client; returns what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60.0, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def jobs(self) -> list[str]:
        """Numbers of all jobs that have not ended."""
        return self.run("squeue", "--noheader", "--format=%A").split()

    def wait(self, number: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of some states."""
        self.until(lambda: self.job(number)["JobState"] in states, f"job {number} {' or '.join(states)}")
        return self.job(number)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = _SETTLE_SECONDS) -> None:
        """Wait until something holds; the daemons' output is shown when it does not."""
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.root.glob("*.out"))
                left = [process.cmdline() for process in self.processes()]
                stop(f"no {what} within {seconds:g} s\n{self.run('squeue', check=False)}\n{left}\n{logs}")
            time.sleep(_POLL_SECONDS)

    def clear(self) -> None:
        """End all jobs at once, and wait until the nodes are idle."""
        # The batch shell first: told by SIGTERM alone it would wait for the steps.
        for number in self.jobs():
            self.run("scancel", "--full", "--signal=KILL", number, check=False)
            self.run("scancel", number, check=False)
        self.until(self._are_idle, "idle nodes")

    def processes(self) -> list[psutil.Process]:
        """All processes of this cluster that are not its daemons."""
        daemons = {daemon.pid for daemon in self._daemons}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if mine and process.pid not in daemons and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _are_idle(self) -> bool:
        nodes = ",".join(NODES)
        said = self.run("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "-p", "low", "-o", "%T", check=False)
        return said.split() == ["idle"] * len(NODES)

    def _write_files(self) -> None:
        conf = _CONF.format(
            host=socket.gethostname(), root=self.root, ports=_free_ports(3), first_job=random.randrange(1, 10**6)
        )
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "gres.conf").write_text(f"NodeName=absent[001-{NUM_ABSENT}] Name=gpu Count=8\n")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.root / "state").mkdir()

    def _start(self, program: str, *arguments: str) -> None:
        with (self.root / f"{program}.out").open("ab") as output:
            command = [self._programs[program], *arguments]
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)
            )

    def _end(self) -> list[str]:
        """Stop all daemons, and whatever else is left; returns that."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20.0)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        left = self.processes()
        names = [" ".join(process.cmdline()) for process in left]
        for process in left:
            process.kill()
        shutil.rmtree(self.root, ignore_errors=True)
        return names


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    """One cluster for all tests."""
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with no job on it; a test fails when it leaves a job or a process."""
    try:
        yield slurm_session
        slurm_session.until(lambda: not slurm_session.jobs() and not slurm_session.processes(), "end of what was begun")
    finally:
        slurm_session.clear()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
