"""Where ranks can be started, and where the nodes of one start meet."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from mempar.errors import ConfigError

PLACES = ("local", "ssh", "slurm")
# Below the ports that Linux gives to whoever asks for any (32768 and up), and above those of most services.
FIRST_PORT, NUM_PORTS = 10000, 20000


# Flags that say something of the cluster, and where that is heeded.
_HEEDED = {
    "--partition": ("slurm",),
    "--account": ("slurm",),
    "--time": ("slurm",),
    "--container-image": ("slurm",),
    "--module": ("ssh", "slurm"),
    "--env": ("ssh", "slurm"),
    "--port": ("ssh", "slurm"),
}


def check_place(place: str, hostfile: Path | None, flags: Iterable[str] = ()) -> None:
    """Refuse a place that there is not, and what would not be heeded there.

    Args:
        place: one of `PLACES`.
        hostfile: names the hosts of `ssh`.
        flags: that were given, of those that say something of the cluster.

    Raises:
        ConfigError: for any of it.
    """
    if place not in PLACES:
        raise ConfigError(f"--on {place} is no place to run; it is one of {', '.join(PLACES)}; use one of these.")
    if (hostfile is None) == (place == "ssh"):
        raise ConfigError(
            "--on ssh needs --hostfile; it names the hosts, in lines of `HOST slots=N`; give one."
            if place == "ssh"
            else f"--on {place} takes no --hostfile; only --on ssh has hosts to choose from; change one of them."
        )
    if lost := [flag for flag in flags if place not in _HEEDED[flag]]:
        heeded = " or ".join(f"--on {name}" for name in _HEEDED[lost[0]])
        raise ConfigError(
            f"{', '.join(lost)} with --on {place}, where nothing heeds {'it' if len(lost) == 1 else 'them'}; {lost[0]} "
            f"is for {heeded}; leave it out, or launch there."
        )


def given_flags(**values: object) -> tuple[str, ...]:
    """Names of the command line's flags that were given, from their values by parameter."""
    return tuple(f"--{name.replace('_', '-')}" for name, value in values.items() if value)


def any_port() -> int:
    """A port to meet at; another one at every start, so that what the one before has left is not in the way."""
    return FIRST_PORT + secrets.randbelow(NUM_PORTS)
