"""The launch profile: what a cluster needs to know of itself, in YAML and never in recipes.

    python: /shared/venv/bin/python
    interface: ib0
    modules: [cuda/12.8]
    env: {NCCL_DEBUG: WARN}
    slurm: {partition: gpu, account: lm, time: "24:00:00"}
    ssh: {user: trainer}

Every name must be known. Values are read as they are written, by the type that the setting has: `time: 24:00:00` is the
text and no number of seconds. What goes into shell commands is quoted there (slurm.py, ssh.py); here only what no
command could hold is refused. Flags of `mempar launch` come before the profile: `with_flags`.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from mempar.errors import ConfigError

GPU_OPTIONS = ("gres", "gpus-per-node", "none")
# sbatch's own limit for --signal.
_MAX_SIGNAL_SECONDS = 65535
# How much earlier than asked for SLURM may send it (`--signal` in sbatch's manual).
_SIGNAL_EARLIER_SECONDS = 60
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTERFACE = re.compile(r"[A-Za-z0-9_.@:-]+(,[A-Za-z0-9_.@:-]+)*")
# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_NO_LIMIT = ("infinite", "unlimited")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What sbatch and srun are told; empty values are left to the cluster's own.

    Attributes:
        partition: queue.
        account: that pays.
        qos: quality of service.
        time: limit of one allocation, as sbatch takes it: `90`, `24:00:00`, `2-12`.
        constraint: features of nodes.
        reservation: to run in.
        nodelist: nodes that must be among them.
        exclude: nodes that must not.
        gpu_option: how GPUs are asked for: `gres` (--gres=gpu:K), `gpus-per-node`, or `none`.
        cpus_per_task: CPUs of a node; with `exclusive` all of them unless given.
        mem: memory of a node; all of it with `exclusive` unless given.
        exclusive: no other jobs on the nodes.
        container_image: that pyxis runs the ranks in.
        container_mounts: `SRC:DST` each; the run's directory is mounted anyway.
        container_workdir: directory in it.
        signal_seconds: how long before the time limit the run saves and ends.
        requeue: whether the job is queued again after the time limit, preemption or a node's failure.
        extra: more options of sbatch, e.g. `--mail-type=END`.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    constraint: str = ""
    reservation: str = ""
    nodelist: str = ""
    exclude: str = ""
    gpu_option: str = "gres"
    cpus_per_task: int | None = None
    mem: str = ""
    exclusive: bool = True
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()
    container_workdir: str = ""
    signal_seconds: int = 300
    requeue: bool = True
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what does not depend on the run."""
        _check_lines("slurm.", self)
        if self.gpu_option not in GPU_OPTIONS:
            raise ConfigError(
                f"slurm.gpu_option={self.gpu_option} is not known; GPUs are asked for with one of "
                f"{', '.join(GPU_OPTIONS)}; set it to one of these."
            )
        _check_range("slurm.cpus_per_task", self.cpus_per_task, 1)
        _check_range("slurm.signal_seconds", self.signal_seconds, 1, _MAX_SIGNAL_SECONDS)
        limit = seconds_of(self.time)
        if self.signal_seconds + _SIGNAL_EARLIER_SECONDS >= limit:
            raise ConfigError(
                f"slurm.signal_seconds={self.signal_seconds} is too much for slurm.time={self.time}, {limit:g} s; the "
                f"run saves and ends that long before the limit, SLURM may say so {_SIGNAL_EARLIER_SECONDS} s earlier, "
                "and the run must have begun by then; lower slurm.signal_seconds, or raise slurm.time."
            )
        for option in self.extra:
            if not option.startswith("-"):
                raise ConfigError(
                    f"slurm.extra holds {option!r}; it is a list of options of sbatch, which begin with a dash; write "
                    "e.g. --mail-type=END."
                )


@dataclass(frozen=True, kw_only=True)
class SshConfig:
    """How hosts are reached; empty values are left to ssh's own configuration.

    Attributes:
        user: to log in as.
        port: of sshd; 0 for ssh's own choice.
        identity: file of the key.
        config: file of settings, as `ssh -F` takes it, in place of the account's own.
        options: values of `-o`, e.g. `StrictHostKeyChecking=accept-new`.
        connect_timeout: seconds.
    """

    user: str = ""
    port: int = 0
    identity: str = ""
    config: str = ""
    options: tuple[str, ...] = ()
    connect_timeout: int = 10

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_lines("ssh.", self)
        _check_range("ssh.port", self.port, 0, 65535)
        _check_range("ssh.connect_timeout", self.connect_timeout, 1)
        if self.user.startswith("-"):
            raise ConfigError(f"ssh.user={self.user} begins with a dash, which ssh takes for an option; name a user.")


@dataclass(frozen=True, kw_only=True)
class LaunchProfile:
    """What nodes need beside the run itself.

    Attributes:
        env: variables of all processes; they are written into scripts and the run's directory as they are, so that
            secrets belong elsewhere.
        modules: loaded with `module load`, in this order.
        setup: lines of shell that run before anything else on a node, e.g. `ulimit -l unlimited`.
        python: the interpreter there; unless given this one, or a container's `python3`.
        workdir: the directory there; the current one unless given.
        nproc_per_node: ranks of a node; None leaves it to flags and the recipe.
        interface: network interface of gloo's and NCCL's sockets.
        rendezvous_seconds: how long nodes wait for one another to begin.
        slurm: of --on slurm.
        ssh: of --on ssh.
    """

    env: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = ""
    workdir: str = ""
    nproc_per_node: int | None = None
    interface: str = ""
    rendezvous_seconds: int = 600
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ssh: SshConfig = field(default_factory=SshConfig)

    def __post_init__(self) -> None:
        """Check names and ranges."""
        _check_lines("", self)
        _check_range("nproc_per_node", self.nproc_per_node, 1)
        _check_range("rendezvous_seconds", self.rendezvous_seconds, 1)
        for name in self.env:
            if not _ENV_NAME.fullmatch(name):
                raise ConfigError(
                    f"env holds {name!r}, which is no name of a variable: letters, digits and _, no digit first; "
                    "rename it."
                )
        if self.interface and not _INTERFACE.fullmatch(self.interface):
            raise ConfigError(
                f"interface={self.interface!r} is no name of a network interface; `ip link` lists them on a node; give "
                "one, or several with commas between them."
            )

    @property
    def interpreter(self) -> str:
        """Python on the nodes."""
        return self.python or ("python3" if self.slurm.container_image else sys.executable)

    @property
    def environment(self) -> dict[str, str]:
        """All variables that processes on the nodes get, those of `interface` too; what `env` says comes first."""
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME") if self.interface else ()
        return {**dict.fromkeys(names, self.interface), **self.env}


def with_flags(
    profile: LaunchProfile,
    *,
    partition: str | None = None,
    account: str | None = None,
    time: str | None = None,
    container_image: str | None = None,
    modules: Iterable[str] = (),
    env: Iterable[str] = (),
) -> LaunchProfile:
    """Return the profile with flags of the command line in place of its own values.

    Args:
        profile: as read.
        partition: instead of its own, where given; so are the next three.
        account: see partition.
        time: see partition.
        container_image: see partition.
        modules: instead of its list, if there are any.
        env: `NAME=VALUE` each, beside its own; the flag's value counts.

    Raises:
        ConfigError: for what a profile could not hold either.
    """
    given = {"partition": partition, "account": account, "time": time, "container_image": container_image}
    slurm = dataclasses.replace(profile.slurm, **{name: value for name, value in given.items() if value is not None})
    variables = dict(profile.env)
    for assignment in env:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--env {assignment} has no =; it sets a variable of all processes; write NAME=VALUE.")
        variables[name] = value
    return dataclasses.replace(profile, slurm=slurm, modules=tuple(modules) or profile.modules, env=variables)


def seconds_of(time: str) -> float:
    """Seconds of a time limit as sbatch takes it; infinite where there is none, or none is known.

    Raises:
        ConfigError: when sbatch would not take it.
    """
    if not time or time.lower() in _NO_LIMIT:
        return math.inf
    parts = _TIME.fullmatch(time)
    if parts is None:
        raise ConfigError(
            f"slurm.time={time!r} is no time limit; sbatch takes minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and "
            "D-HH:MM:SS; write e.g. 24:00:00."
        )
    first, second, third = (int(parts[name] or 0) for name in ("first", "second", "third"))
    if parts["days"] is not None:
        seconds = int(parts["days"]) * 86400 + first * 3600 + second * 60 + third
    elif parts["third"] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    # Zero stands for no limit.
    return float(seconds or math.inf)


def _check_lines(section: str, settings: SlurmConfig | SshConfig | LaunchProfile) -> None:
    """Refuse texts that no line of a script could hold."""
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, str) and any(not character.isprintable() and character != "\t" for character in text):
                raise ConfigError(
                    f"{section}{setting.name} holds {text!r}; a value is one line of printable characters; split "
                    "it, or take the others out."
                )


def _check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is not None and not (least <= value and (most is None or value <= most)):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name}={value} must be {bounds}; change {name}.")
