"""Where ranks can be started, and where the nodes of one start meet."""

import secrets
from pathlib import Path

from mempar.errors import ConfigError

PLACES = ("local", "ssh", "slurm")
# Below the ports that Linux gives to whoever asks for any (32768 and up), and above those of most services.
FIRST_PORT, NUM_PORTS = 10000, 20000


def check_place(place: str, hostfile: Path | None) -> None:
    """Refuse a place that there is not, and a hostfile where there are no hosts to choose from.

    Raises:
        ConfigError: for either.
    """
    if place not in PLACES:
        raise ConfigError(f"--on {place} is no place to run; it is one of {', '.join(PLACES)}; use one of these.")
    if (hostfile is None) == (place == "ssh"):
        what = "needs --hostfile, which names the hosts" if place == "ssh" else "takes no --hostfile"
        raise ConfigError(f"--on {place} {what}; only --on ssh has hosts to choose from; change one of them.")


def any_port() -> int:
    """A port to meet at; another one at every start, so that what the one before has left is not in the way."""
    return FIRST_PORT + secrets.randbelow(NUM_PORTS)
