"""Which hosts a run starts on: DeepSpeed's hostfile format, and the choice of some of them.

A line is a host and the ranks that it takes, usually one a GPU; `#` begins a comment:

    node1 slots=8
    node2 slots=8    # rack 3

Names end up on ssh's command line, so that only what can be a host's name is let through. Whether hosts answer is
`reach`'s to find out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mempar.errors import ConfigError

# Letters, digits, and in between dots, dashes and underscores: a name or an IPv4 address, and never an option.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
# What DNS allows.
_MAX_NAME_LENGTH = 253
_SLOTS = re.compile(r"slots=([0-9]{1,4})")
_FORMAT = "a line of a hostfile is HOST slots=N"
_EXAMPLE = "node1 slots=8"
# Of a list in a message.
_MOST_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that takes ranks.

    Attributes:
        name: as ssh and the other hosts know it.
        slots: ranks that it takes at most.
    """

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read the hosts of a file, in its order.

    Raises:
        ConfigError: when the file cannot be read, names no host, or one of its lines is wrong; the message has the
            line's number.
    """
    hosts: list[Host] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        host = _parse(text, where)
        # ssh and DNS do not tell Node1 from node1.
        first = lines.setdefault(host.name.lower(), number)
        if first != number:
            raise ConfigError(
                f"{where}: host '{host.name}' is already named in line {first}; a host has one line, with all its "
                "slots; remove one of the two."
            )
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"{path} names no host; {_FORMAT}; write one for every host, e.g. {_EXAMPLE}.")
    return tuple(hosts)


def choose_hosts(
    hosts: Sequence[Host], path: Path, *, nodes: int | None = None, per_node: int | None = None
) -> tuple[Host, ...]:
    """Choose the hosts that a run starts on: the first ones, with as many ranks on each.

    Args:
        hosts: all that there are.
        path: the hostfile they are from, for messages.
        nodes: hosts to take; None for all.
        per_node: ranks on each; None for their slots, which must then be the same.

    Returns:
        The hosts, with the ranks to start as their slots.

    Raises:
        ConfigError: when there are fewer hosts or slots than asked for, or hosts with unlike slots and no `per_node`.
    """
    for name, value in (("--nodes", nodes), ("--nproc-per-node", per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1; a run has a rank on every host; raise it.")
    if nodes is not None and nodes > len(hosts):
        raise ConfigError(
            f"--nodes={nodes}, but {path} names {len(hosts)}; every node is a host of the hostfile; add hosts to it, "
            f"or ask for --nodes {len(hosts)}."
        )
    chosen = hosts[:nodes]
    fewest = min(host.slots for host in chosen)
    if per_node is None:
        if any(host.slots != fewest for host in chosen):
            raise ConfigError(
                f"{path}: hosts have unlike slots ({_show(chosen)}), but every node starts as many ranks; choose with "
                f"--nproc-per-node {fewest}, or give them the same slots."
            )
        per_node = fewest
    short = [host for host in chosen if host.slots < per_node]
    if short:
        raise ConfigError(
            f"--nproc-per-node={per_node}, but {path} has {_show(short)}; a host takes no more ranks than it has "
            f"slots; ask for --nproc-per-node {fewest}, or raise the slots where there are more GPUs."
        )
    return tuple(Host(name=host.name, slots=per_node) for host in chosen)


def check_host_name(name: str, where: str) -> None:
    """Refuse what cannot be a host's name; an option of ssh, or a word with a meaning to a shell, is none.

    Args:
        name: what is to be a host.
        where: where it was read, for the message.

    Raises:
        ConfigError: when it is none.
    """
    if len(name) > _MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        shown = name if len(name) <= _MAX_NAME_LENGTH else f"{name[:20]}..."
        hint = "set the user in ssh's own config" if "@" in name else "write its name or its IPv4 address"
        raise ConfigError(
            f"{where}: {shown!r} is no host name; one has letters and digits, with '.', '-' and '_' only between them, "
            f"and {_MAX_NAME_LENGTH} characters at most; {hint}."
        )


def _read(path: Path) -> str:
    try:
        # Editors of other systems put a mark before the first host.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"hostfile {path} does not exist; {_FORMAT}, e.g. {_EXAMPLE}; write it.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"hostfile {path} is no text; {_FORMAT}, e.g. {_EXAMPLE}; name another file.") from None
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read ({error.strerror}); it must be a readable file; mend or name another one."
        ) from None


def _parse(text: str, where: str) -> Host:
    name, *rest = text.split()
    check_host_name(name, where)
    if not rest:
        raise ConfigError(f"{where}: host '{name}' has no slots; {_FORMAT}; write {name} slots=8 for eight ranks.")
    found = _SLOTS.fullmatch(rest[0])
    if not found or int(found[1]) < 1:
        raise ConfigError(
            f"{where}: {rest[0]!r} must be slots=N with N from 1 to 9999, without blanks; {_FORMAT}; write {name} "
            "slots=8 for eight ranks."
        )
    if len(rest) > 1:
        raise ConfigError(
            f"{where}: {' '.join(rest[1:])!r} follows the slots of host '{name}'; {_FORMAT} and nothing more; remove "
            "it, or put # before it."
        )
    return Host(name=name, slots=int(found[1]))


def _show(hosts: Sequence[Host]) -> str:
    shown = ", ".join(f"{host.name} slots={host.slots}" for host in hosts[:_MOST_SHOWN])
    more = len(hosts) - _MOST_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
