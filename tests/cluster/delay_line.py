"""Carries frames between two interfaces of its own, each some time after it came: netem's delay, without netem.

    python delay_line.py NAME NAME SECONDS PARENT       as root; the interfaces (taps) are there until the process ends

It ends with the process that started it (PARENT), or after an hour: it runs before whatever else the machine does.

Frames are what the kernel has not cut yet, up to 64 kB, with the header that says how to (virtio's): a fast link has
few of them.
"""

import fcntl
import os
import select
import signal
import struct
import sys
import time
from collections import deque

from mempar.runtime.launch.parent import die_with

TUN = "/dev/net/tun"
DEADLINE_SECONDS = 3600
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PI, _VNET_HDR = 0x0002, 0x1000, 0x4000
# Frames whose checksum or segmentation is still to be done, for IPv4 and IPv6.
_CHECKSUM, _TSO4, _TSO6 = 0x01, 0x02, 0x04
_MOST_BYTES = 1 << 17


def open_tap(name: str) -> int:
    """Make an interface; frames are read from the descriptor and written to it.

    Where there can be none, the process ends with one line that says so.
    """
    try:
        tap = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HDR))
        fcntl.ioctl(tap, _TUNSETOFFLOAD, _CHECKSUM | _TSO4 | _TSO6)
    except OSError as error:
        sys.exit(f"no interface {name} by {TUN} ({error.strerror}): a delay needs the kernel's module tun, and root.")
    return tap


def carry(first: int, second: int, seconds: float) -> None:
    """Carry frames both ways, for ever."""
    lines = {first: (second, deque()), second: (first, deque())}
    while True:
        dues = [waiting[0][0] for _, waiting in lines.values() if waiting]
        timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
        readable, _, _ = select.select(list(lines), [], [], timeout)
        now = time.monotonic()
        for tap in readable:
            lines[tap][1].append((now + seconds, os.read(tap, _MOST_BYTES)))
        for other, waiting in lines.values():
            while waiting and waiting[0][0] <= now:
                try:
                    os.write(other, waiting.popleft()[1])
                except OSError:
                    # As a cable does: an interface that is down takes nothing.
                    continue


if __name__ == "__main__":
    die_with(int(sys.argv[4]))
    signal.alarm(DEADLINE_SECONDS)
    carry(open_tap(sys.argv[1]), open_tap(sys.argv[2]), float(sys.argv[3]))
