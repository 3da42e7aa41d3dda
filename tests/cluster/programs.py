"""What tests of clusters need on the machine: root, and programs of Debian packages, which are installed if missing.

Nothing is skipped: what cannot be had fails with one line that says what is missing. No package's services are started.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

# Debian leaves these out of the PATH of some.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
# Maintainers' scripts ask it whether they may start a service.
_POLICY = Path("/usr/sbin/policy-rc.d")
_APT_SECONDS = 300.0


def need_programs(packages: Mapping[str, str]) -> dict[str, str]:
    """Find programs, installing the Debian packages of those that are missing.

    Args:
        packages: by program, the package that has it.

    Returns:
        By program, its path.
    """
    if os.geteuid() != 0:
        stop("not root: tests of clusters make network namespaces and start daemons; run them as root.")
    missing = {package for program, package in packages.items() if not shutil.which(program, path=PATH)}
    if missing:
        with _one_at_a_time(), _no_services():
            _install(sorted(missing))
    found = {program: shutil.which(program, path=PATH) for program in packages}
    if lost := sorted(program for program, path in found.items() if not path):
        stop(f"no {', '.join(lost)} here, though {', '.join(sorted(missing))} is installed; see its package.")
    return {program: path for program, path in found.items() if path}


def stop(what: str) -> NoReturn:
    """Fail the test with one line."""
    pytest.fail(what, pytrace=False)


def _install(packages: list[str]) -> None:
    apt = shutil.which("apt-get", path=PATH)
    names = " ".join(packages)
    if not apt:
        stop(f"no apt-get here, and the packages {names} are missing; install their programs by other means.")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": PATH}
    common = [apt, "-qq", "-o", "DPkg::Lock::Timeout=120"]
    install = [*common, "install", "--yes", "--no-install-recommends", *packages]
    for command in (install, [*common, "update"], install):
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_APT_SECONDS,
            check=False,
        )
        if command is install and done.returncode == 0:
            return
    said = done.stderr.strip().splitlines() or ["it said nothing"]
    stop(f"`apt-get install {names}` failed ({said[-1]}); install the packages by hand.")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    with open("/run/lock/mempar-install", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Deny that packages start what they bring, unless the machine has a policy of its own."""
    try:
        file = os.open(_POLICY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    except FileExistsError:
        yield
        return
    try:
        os.write(file, b"#!/bin/sh\nexit 101\n")
        os.close(file)
        yield
    finally:
        _POLICY.unlink()
