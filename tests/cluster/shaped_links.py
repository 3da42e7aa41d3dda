"""Links of two hosts (hosts.py) slower than the machine: a rate by `tc`, both ways, and a delay by a process of ours.

The rate is a token bucket (tbf) on each host's way out. Its bucket is small, so that little of a message goes ahead of
it, and its queue takes what TCP keeps on the way, so that nothing is lost. Nor does TCP start anew after a pause: what
is measured is the link.

The delay does the work of netem, which not every kernel has: the second host's end of the bridge hangs on a bridge of
its own, and `delay_line.py` carries frames between the two.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hosts import INTERFACE, SUBMIT, Hosts, wait_for
from programs import stop

# What TCP hands over in one piece at most, a millisecond's bytes; the bucket holds one of them with its headers. Larger
# pieces would be cut into single frames, of which a fast link has many.
_PIECE_SECONDS, _MOST_PIECE, _WITH_HEADERS = 1e-3, 60_000, 1.08
_QUEUE_BYTES, _QUEUE_FRAMES = 32 << 20, 10_000
# TCP of a name space has the kernel's plainest congestion control, which no loss slows down here, no new start after a
# pause.
_SETTINGS = {"ipv4/tcp_congestion_control": "reno", "ipv4/tcp_slow_start_after_idle": "0"}
_NEAR, _FAR, _BRIDGE = "near", "far", "br1"


def first_of_all(command: Sequence[str]) -> list[str]:
    """A command that runs before whatever else the machine does: the link is to bound it and not the processor.

    A session of its own, because Linux shares processors out among sessions before it looks at what is in them.
    """
    ahead = 'echo -19 > /proc/self/autogroup; exec nice -n -19 "$@"'
    return ["setsid", "sh", "-c", ahead, "sh", *command]


def steady_tcp(hosts: Hosts) -> None:
    """Let the hosts' TCP hold a link's rate, whatever it is."""
    for name in hosts.names:
        for setting, value in _SETTINGS.items():
            hosts.run(["sh", "-c", f"echo {value} > /proc/sys/net/{setting}"], on=name)


@contextlib.contextmanager
def shaped(hosts: Hosts, mbit: float) -> Iterator[None]:
    """Bound what every host sends to a rate, headers included; for connections that are made in the meantime."""
    piece = min(int(mbit * 1e6 / 8 * _PIECE_SECONDS), _MOST_PIECE)
    bucket = ["tbf", "rate", f"{mbit}mbit", "burst", str(int(piece * _WITH_HEADERS)), "limit", str(_QUEUE_BYTES)]
    try:
        for name in hosts.names:
            hosts.run(["ip", "link", "set", INTERFACE, "gso_max_size", str(piece)], on=name)
            hosts.run(["tc", "qdisc", "replace", "dev", INTERFACE, "root", *bucket], on=name)
        yield
    finally:
        for name in hosts.names:
            hosts.run(["tc", "qdisc", "del", "dev", INTERFACE, "root"], on=name, check=False)
            hosts.run(["ip", "link", "set", INTERFACE, "gso_max_size", "65536"], on=name, check=False)


@contextlib.contextmanager
def delayed(hosts: Hosts, seconds: float) -> Iterator[None]:
    """Let everything that the hosts send each other take longer."""
    end = f"to-{hosts.names[-1]}"
    script = Path(__file__).with_name("delay_line.py")
    line = hosts.start(first_of_all([sys.executable, str(script), _NEAR, _FAR, str(seconds), str(os.getpid())]))

    def is_there() -> bool:
        return hosts.run(["ip", "link", "show", _FAR], check=False).returncode == 0

    def ip(*words: str) -> None:
        hosts.run(["ip", "link", *words], on=SUBMIT)

    try:
        if not wait_for(lambda: is_there() or line.poll() is not None) or line.poll() is not None:
            said = line.communicate()[0].strip().splitlines() if line.poll() is not None else []
            stop(f"the delay line does not start: {said[-1] if said else 'it says nothing'}")
        ip("add", _BRIDGE, "type", "bridge")
        for tap in (_NEAR, _FAR):
            ip("set", tap, "txqueuelen", str(_QUEUE_FRAMES))
        for name, bridge in ((_NEAR, "br0"), (_FAR, _BRIDGE), (end, _BRIDGE)):
            ip("set", name, "master", bridge, "up")
        ip("set", _BRIDGE, "up")
        yield
    finally:
        hosts.run(["ip", "link", "set", end, "master", "br0"], check=False)
        hosts.run(["ip", "link", "del", _BRIDGE], check=False)
        line.kill()
        line.wait()
