"""Clocks: whether this machine's is kept, and whether those of several hosts agree.

Times of failures on several hosts are compared to find the first one, and a time limit counts from the launcher's
clock, so clocks that differ name the wrong host or end runs early.
"""

import ctypes
import subprocess

from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding, duration

# Failures follow each other within seconds; a time limit is in minutes.
_LEAST_SKEW_SECONDS, _LARGE_SKEW_SECONDS = 0.5, 30.0
_PATIENCE_SECONDS = 5.0
# <sys/timex.h>: the status bit, where the status lies in the struct (after five longs), and more than its size.
_UNSYNCHRONISED, _STATUS_OFFSET, _STRUCT_BYTES = 0x40, 40, 256


def collect() -> bool | None:
    """Whether this machine's clock is kept by NTP or the like; None if nobody knows."""
    try:
        said = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=True,
        ).stdout.strip()
        return said == "yes" if said in ("yes", "no") else _kernel_says()
    except (OSError, subprocess.SubprocessError):
        return _kernel_says()


def check(is_kept: bool | None, num_nodes: int) -> list[Finding]:
    """Judge this machine's clock."""
    if is_kept:
        return [Finding(check="clocks.kept", level=OK, what="the clock is synchronised")]
    unknown = is_kept is None
    return [
        Finding(
            check="clocks.kept",
            level=WARNING if num_nodes > 1 and not unknown else NOTE,
            what="whether the clock is synchronised is not known" if unknown else "the clock is not synchronised",
            rule="the first of several failures is found by the times on their hosts"
            + ("" if num_nodes > 1 else "; on one machine it does not matter"),
            remedy="run chrony or systemd-timesyncd on every host" + ("" if num_nodes > 1 else " of a cluster"),
        )
    ]


def skew(offsets: dict[str, float], uncertainty: float) -> list[Finding]:
    """Judge how far the clocks of several hosts are apart.

    Args:
        offsets: seconds that each host's clock is ahead of one of theirs.
        uncertainty: of these numbers, in seconds: how long it took to ask.

    Returns:
        Nothing for a single host.
    """
    if len(offsets) < 2:
        return []
    first, last = (order(offsets, key=lambda host: offsets[host]) for order in (min, max))
    apart = offsets[last] - offsets[first]
    sure = max(0.0, apart - uncertainty)
    values = {"offsets": offsets, "uncertainty_seconds": uncertainty}
    if sure <= _LEAST_SKEW_SECONDS:
        what = f"clocks of {len(offsets)} hosts agree within {apart * 1000:.1f} ms"
        return [Finding(check="clocks.skew", level=OK, what=what, values=values)]
    return [
        Finding(
            check="clocks.skew",
            level=ERROR if sure > _LARGE_SKEW_SECONDS else WARNING,
            what=f"the clock of {last} is {duration(apart)} ahead of that of {first}",
            rule="the first of several failures is found by the times on their hosts, and time limits count from the "
            "launcher's",
            remedy=f"run chrony or systemd-timesyncd on both (chronyc tracking), or leave out {last}",
            values=values,
        )
    ]


def _kernel_says() -> bool | None:
    """What adjtimex(2) says, which whoever keeps the clock tells the kernel."""
    try:
        call = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    buffer = ctypes.create_string_buffer(_STRUCT_BYTES)
    if call(buffer) < 0:
        return None
    return not ctypes.c_int.from_buffer(buffer, _STATUS_OFFSET).value & _UNSYNCHRONISED
