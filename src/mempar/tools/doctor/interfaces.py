"""What this machine is connected by: interfaces, its own name, the way to others, InfiniBand ports."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from mempar.tools.doctor.environment import NetworkSettings

_INFINIBAND = Path("/sys/class/infiniband")
# Of documentation (RFC 5737): asking for the way there sends nothing, and shows the default route.
_FAR_AWAY = "198.51.100.1"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One network interface.

    Attributes:
        name: of it.
        addresses: IPv4 and IPv6, without scopes.
        is_up: whether it is.
        mbit_per_s: its speed; 0 if it is not known, as of virtual ones.
        mtu: bytes of its largest packet.
    """

    name: str
    addresses: tuple[str, ...] = ()
    is_up: bool = True
    mbit_per_s: int = 0
    mtu: int = 1500

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine alone."""
        return self.name == "lo" or (bool(self.addresses) and all(map(is_loopback, self.addresses)))

    def __str__(self) -> str:
        speed = f"{self.mbit_per_s / 1000:g} Gb/s" if self.mbit_per_s else "speed unknown"
        return f"{self.name} ({', '.join(self.addresses[:1]) or 'no address'}, {speed}, MTU {self.mtu})"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What this machine is connected by.

    Attributes:
        interfaces: all of them.
        hostname: of this machine.
        host_addresses: what that name resolves to; empty if it does not.
        route: name of the interface that leads to the peer, or out if there is none; empty if nothing does.
        peer: another host of the job, or the rendezvous; empty if none is known.
        infiniband: states of its ports by device, e.g. `{"mlx5_0": "ACTIVE"}`.
        settings: what environment variables choose.
    """

    interfaces: tuple[Interface, ...]
    hostname: str
    host_addresses: tuple[str, ...] = ()
    route: str = ""
    peer: str = ""
    infiniband: dict[str, str]
    settings: NetworkSettings


def collect(settings: NetworkSettings, hosts: tuple[str, ...]) -> Network:
    """Look at this machine.

    Args:
        settings: what environment variables choose.
        hosts: of the job, this one among them.
    """
    hostname = socket.gethostname()
    others = [host for host in (settings.rendezvous_host, *hosts) if host and host not in (hostname, "localhost")]
    interfaces = _interfaces()
    return Network(
        interfaces=interfaces,
        hostname=hostname,
        host_addresses=_resolve(hostname),
        route=_route(others[0] if others else _FAR_AWAY, interfaces),
        peer=others[0] if others else "",
        infiniband=_infiniband(),
        settings=settings,
    )


def is_loopback(address: str) -> bool:
    """Whether an address leads to this machine alone."""
    return ip_address(address).is_loopback


def _interfaces() -> tuple[Interface, ...]:
    try:
        import psutil
    except ImportError:
        # Has a finding of its own.
        return tuple(Interface(name=name) for _, name in socket.if_nameindex())
    states = psutil.net_if_stats()
    interfaces = []
    for name, given in psutil.net_if_addrs().items():
        addresses = [one.address.partition("%")[0] for one in given if one.family in (socket.AF_INET, socket.AF_INET6)]
        state = states.get(name)
        interfaces.append(
            Interface(
                name=name,
                addresses=tuple(addresses),
                is_up=state is not None and state.isup,
                mbit_per_s=state.speed if state else 0,
                mtu=state.mtu if state else 0,
            )
        )
    return tuple(interfaces)


def _resolve(name: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def _route(host: str, interfaces: tuple[Interface, ...]) -> str:
    """Name of the interface over which a host is reached; nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:
            asking.connect(address)
            own = str(asking.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""
    return next((one.name for one in interfaces if own in one.addresses), "")


def _infiniband() -> dict[str, str]:
    """The best state of each device's ports."""
    states = {}
    for device in sorted(_INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []:
        found = []
        for path in device.glob("ports/*/state"):
            try:
                # "4: ACTIVE"
                found.append(path.read_text().partition(":")[2].strip())
            except OSError:
                continue
        states[device.name] = "ACTIVE" if "ACTIVE" in found else next(iter(found), "unknown")
    return states
