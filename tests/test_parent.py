"""A process that dies with its parent, however the parent dies, and however early."""

import os
import signal
import subprocess
import sys
import time

# Starts a child that dies with it, says its number, and waits.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import sys, time
from mempar.runtime.launch.parent import die_with
die_with(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_process_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_process_whose_parent_is_already_gone_ends_at_once() -> None:
    # The number of a process that is not its parent stands for one that has died.
    done = subprocess.run([sys.executable, "-c", CHILD, str(os.getpid() + 1)], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_process_that_does_not_know_its_parent_goes_on() -> None:
    code = CHILD.replace("time.sleep(60)", "")
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, timeout=30, check=True)
    assert done.stdout == b"ready\n"
