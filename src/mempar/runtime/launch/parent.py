"""Dying with one's parent, as ranks do with their launcher and workers with their command; no torch here."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies.

    The signal comes when the thread that started this process ends, so parents start such processes from their main
    thread. It does not reach children of this process: those call this for themselves.

    Args:
        parent: process that started this one; 0 if it is not known.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        # It died before the call above, which is about later deaths.
        os._exit(1)
