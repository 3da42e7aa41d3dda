"""mempar.tools.launch.reach with a real ssh: hosts that are there, cut off, without sshd, and of no known name."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hosts import Hosts

pytestmark = pytest.mark.cluster

# The launcher's side is on the submit host, which this process is not.
ASK = """
import json, sys
from pathlib import Path
from mempar.errors import ConfigError
from mempar.tools.launch.hostfile import Host
from mempar.tools.launch.reach import check_reachable
names, ssh, timeout, directory, python = json.loads(sys.argv[1])
hosts = [Host(name=name, slots=1) for name in names]
try:
    check_reachable(hosts, ssh, timeout, directory=Path(directory), python=python)
except ConfigError as error:
    print(error)
"""


def ask(hosts: Hosts, names: Sequence[str], timeout: float, directory: Path, python: str = sys.executable) -> str:
    question = json.dumps([list(names), hosts.ssh, timeout, str(directory), python])
    return hosts.run([sys.executable, "-c", ASK, question]).stdout


def test_hosts_are_asked_through_ssh(hosts: Hosts, tmp_path: Path):
    assert ask(hosts, hosts.names, 20.0, tmp_path) == ""
    said = ask(hosts, hosts.names, 20.0, tmp_path / "missing")
    assert "2 of 2" in said and f"hostB: directory {tmp_path / 'missing'} is not there" in said


def test_hosts_that_are_down_are_named(hosts: Hosts, tmp_path: Path):
    hosts.kill_sshd("hostA")
    hosts.drop_link("hostB")
    said = ask(hosts, ["hostA", "hostB", "nowhere"], 3.0, tmp_path)
    lines = said.splitlines()
    assert lines[0] == "3 of 3 hosts cannot be used:"
    assert lines[1].startswith("  hostA: ssh: connect to host") and lines[1].endswith("Connection refused")
    assert lines[2].startswith("  hostB: ") and any(
        word in lines[2] for word in ("No route to host", "timed out", "no answer in 3 s")
    )
    assert lines[3].startswith("  nowhere: ssh: Could not resolve hostname nowhere")
    assert f"`{' '.join(hosts.ssh)} hostA true`" in lines[4]
