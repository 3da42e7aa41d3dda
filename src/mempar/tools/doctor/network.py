"""The network: which interface ranks will use, names that lead nowhere, and the fast fabric beside it."""

from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from mempar.tools.doctor.interfaces import Network, is_loopback

# Below it, gradients of a small model alone take longer to move between hosts than to compute.
_LEAST_MBIT_PER_S = 10_000
_FAST_MBIT_PER_S, _JUMBO_MTU = 25_000, 9000


def check(network: Network, *, backend: str, num_nodes: int) -> list[Finding]:
    """Judge them.

    Args:
        network: what is there.
        backend: `nccl` or `gloo`.
        num_nodes: that a run spans; on one alone the network between hosts matters little.
    """
    return [
        _ways(network, num_nodes),
        *_named(network, backend),
        _hostname(network, backend, num_nodes),
        *_fabric(network, backend, num_nodes),
    ]


def _ways(network: Network, num_nodes: int) -> Finding:
    check, outward = "network.interfaces", [one for one in network.interfaces if not one.is_loopback and one.is_up]
    usable = [one for one in outward if one.addresses]
    values = {"interfaces": [one.name for one in usable], "route": network.route}
    used = next((one for one in usable if one.name == network.route), None)
    if used is None:
        to = f"to {network.peer}" if network.peer else "out"
        there = f"{', '.join(map(str, usable)) or 'no interface but loopback'}; no way {to}"
        return Finding(
            check=check,
            level=ERROR if num_nodes > 1 else NOTE,
            what=there,
            rule="ranks of other hosts are reached over an interface that is up, has an address and a route",
            remedy="see `ip addr` and `ip route`; on one machine nothing",
            values=values,
        )
    what = f"{used} leads {f'to {network.peer}' if network.peer else 'out'}"
    others = [str(one) for one in usable if one is not used]
    what += f"; others: {', '.join(others)}" if others else ""
    if num_nodes > 1 and 0 < used.mbit_per_s < _LEAST_MBIT_PER_S and not _active(network):
        return Finding(
            check=check,
            level=WARNING,
            what=what,
            rule=f"{num_nodes} hosts exchange gradients and rows at every step, and {used.mbit_per_s / 1000:g} Gb/s is "
            "slow for that",
            remedy="name a faster interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or keep to one machine",
            values=values,
        )
    if num_nodes > 1 and used.mbit_per_s >= _FAST_MBIT_PER_S and used.mtu < _JUMBO_MTU and not _active(network):
        return Finding(
            check=check,
            level=NOTE,
            what=what,
            rule=f"over TCP a fast link is better used with packets of {_JUMBO_MTU} bytes, if every switch takes them",
            remedy=f"ask for MTU {_JUMBO_MTU} on {used.name} of all hosts",
            values=values,
        )
    return Finding(check=check, level=OK, what=what, values=values)


def _named(network: Network, backend: str) -> list[Finding]:
    """Interfaces that environment variables name."""
    findings = []
    names = [one.name for one in network.interfaces]
    for variable, text, of_nccl in (
        ("GLOO_SOCKET_IFNAME", network.settings.gloo_interfaces, False),
        ("NCCL_SOCKET_IFNAME", network.settings.nccl_interfaces, True),
    ):
        if not text:
            continue
        absent = _absent_nccl(text, names) if of_nccl else [part for part in text.split(",") if part not in names]
        if not absent:
            findings.append(Finding(check=f"network.{variable}", level=OK, what=f"{variable}={text}"))
            continue
        # gloo carries megatron's host-side groups beside NCCL too.
        fails = not of_nccl or backend == "nccl"
        findings.append(
            Finding(
                check=f"network.{variable}",
                level=ERROR if fails else WARNING,
                what=f"{variable}={text} names {', '.join(absent)}; here are {', '.join(names)}",
                rule="ranks use the interfaces that it names, and fail where there are none",
                remedy=f"set {variable} to one of {_suggestion(network)}, in the launch profile, or unset it",
            )
        )
    return findings


def _absent_nccl(text: str, names: list[str]) -> list[str]:
    """Parts of NCCL_SOCKET_IFNAME to which there is no interface; what it excludes may be absent."""
    if text.startswith("^"):
        return []
    exact, parts = text.startswith("="), text.removeprefix("=").split(",")
    found = {part: any(name == part if exact else name.startswith(part) for name in names) for part in parts}
    # It takes those that are there; none at all is what fails.
    return [] if any(found.values()) else parts


def _suggestion(network: Network) -> str:
    outward = [one.name for one in network.interfaces if one.is_up and one.addresses and not one.is_loopback]
    return ", ".join(sorted(outward, key=lambda name: name != network.route)) or "lo"


def _hostname(network: Network, backend: str, num_nodes: int) -> Finding:
    check, name, addresses = "network.hostname", network.hostname, network.host_addresses
    chosen = network.settings.gloo_interfaces
    if addresses and not all(map(is_loopback, addresses)):
        own = {address for one in network.interfaces for address in one.addresses}
        if not own or any(address in own for address in addresses):
            return Finding(check=check, level=OK, what=f"{name} is {', '.join(addresses)}")
        what = f"{name} resolves to {', '.join(addresses)}, which no interface here has"
    else:
        what = f"{name} resolves to {', '.join(addresses)}" if addresses else f"{name} does not resolve"
    several = num_nodes > 1
    return Finding(
        check=check,
        level=ERROR if several and not chosen else NOTE,
        what=what + (f"; GLOO_SOCKET_IFNAME={chosen} chooses another" if chosen else ""),
        rule="gloo and torchrun tell other hosts the address of this machine's name"
        + (", which must lead here from there" if several else "; on one machine loopback will do"),
        remedy=f"set GLOO_SOCKET_IFNAME={_suggestion(network)} in the launch profile, or give {name} its address in "
        "/etc/hosts or DNS" + ("" if several else " before a run spans machines"),
    )


def _fabric(network: Network, backend: str, num_nodes: int) -> list[Finding]:
    check, ports = "network.infiniband", network.infiniband
    down = [f"{name} ({state})" for name, state in ports.items() if state != "ACTIVE"]
    values = {"ports": ports}
    if ports and network.settings.infiniband_off:
        return [
            Finding(
                check=check,
                level=WARNING if num_nodes > 1 else NOTE,
                what=f"{len(ports)} InfiniBand or RoCE devices, and NCCL_IB_DISABLE is set",
                rule="NCCL then uses sockets, which are slower many times over",
                remedy="unset NCCL_IB_DISABLE",
                values=values,
            )
        ]
    if down:
        return [
            Finding(
                check=check,
                level=WARNING if num_nodes > 1 and backend == "nccl" else NOTE,
                what=f"not active: {', '.join(down)}; active: {', '.join(_active(network)) or 'none'}",
                rule="NCCL spreads traffic over all active ports; GPUs beside one that is down go a longer way",
                remedy="look at ibstat and the cable, or name the good ones in NCCL_IB_HCA",
                values=values,
            )
        ]
    if ports:
        return [Finding(check=check, level=OK, what=f"{', '.join(ports)} active", values=values)]
    if num_nodes > 1 and backend == "nccl":
        return [
            Finding(
                check=check,
                level=WARNING,
                what="no InfiniBand or RoCE device",
                rule=f"between {num_nodes} hosts NCCL would use sockets, which are slower many times over",
                remedy="see that the container has /dev/infiniband and /sys/class/infiniband; without such a network, "
                "keep memory and tensor parallelism inside a machine",
                values=values,
            )
        ]
    return []


def _active(network: Network) -> list[str]:
    return [name for name, state in network.infiniband.items() if state == "ACTIVE"]
