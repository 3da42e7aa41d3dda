"""The hosts on one machine are hosts: names, addresses, ranks across them, cuts and failures; nothing is left."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hosts import INTERFACE, SUBMIT, Hosts, remove_strays, wait_for
from programs import need_programs

pytestmark = pytest.mark.cluster

RANKS_PORT = 29511
# What ssh is given to notice a lost link: a question a second, two of them without answer.
ALIVE = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2"]


def test_hosts_have_names_and_addresses_of_their_own(hosts: Hosts):
    assert hosts.names == ("hostA", "hostB")
    for name in hosts.names:
        said = hosts.run([*hosts.ssh, name, "hostname; hostname -i; ip -brief link"]).stdout.splitlines()
        assert said[:2] == [name, hosts.addresses[name]]
        links = [line.partition("@")[0].split()[0] for line in said[2:]]
        assert sorted(links) == [INTERFACE, "lo"]
    # By name, to each other, and no process of one is seen on another.
    assert hosts.run(["getent", "hosts", "hostB"], on="hostA").stdout.split() == [hosts.addresses["hostB"], "hostB"]
    assert hosts.run(["hostname"]).stdout.strip() == SUBMIT


def test_ranks_on_two_hosts_reduce_over_gloo(hosts: Hosts, tmp_path: Path):
    script = Path(__file__).with_name("all_reduce.py")
    agents = []
    for index, name in enumerate(hosts.names):
        torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {index} "
        torchrun += f"--rdzv-backend static --master-addr hostA --master-port {RANKS_PORT} "
        command = (
            f"GLOO_SOCKET_IFNAME={INTERFACE} OMP_NUM_THREADS=1 {torchrun}{shlex.join([str(script), str(tmp_path)])}"
        )
        agents.append(hosts.start([*hosts.ssh, name, command]))
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["host"] for rank in seen] == ["hostA", "hostB"]
    assert [rank["total"] for rank in seen] == [11.0, 11.0]
    assert [rank["world_size"] for rank in seen] == [2, 2]


def test_a_dropped_link_ends_ssh_and_not_what_it_runs(hosts: Hosts):
    ssh = hosts.start([*hosts.ssh, *ALIVE, "hostB", "exec sleep 300"])
    assert wait_for(lambda: "sleep 300" in hosts.processes("hostB").values())
    hosts.drop_link("hostB")
    began = time.monotonic()
    said, _ = ssh.communicate(timeout=30)
    assert time.monotonic() - began < 15.0
    assert ssh.returncode == 255 and "not responding" in said, said
    # The other host is still reached, this one is not.
    assert hosts.run([*hosts.ssh, "hostA", "echo here"]).stdout == "here\n"
    lost = hosts.run([*hosts.ssh, "-o", "ConnectTimeout=1", "hostB", "true"], check=False)
    assert lost.returncode == 255 and "hostb port 2222" in lost.stderr.lower(), lost.stderr
    hosts.restore_link("hostB")
    assert hosts.run([*hosts.ssh, "hostB", "echo back"]).stdout == "back\n"
    # Nobody tells a remote command that its ssh is gone.
    assert list(hosts.processes("hostB").values()) == ["sleep 300"]
    (pid,) = hosts.processes("hostB")
    hosts.run(["kill", str(pid)], on="hostB")


def test_a_killed_sshd_ends_its_connections(hosts: Hosts):
    ssh = hosts.start([*hosts.ssh, "hostB", "cat; exec sleep 0.2"])
    assert wait_for(lambda: bool(hosts.processes("hostB")))
    hosts.kill_sshd("hostB")
    said, _ = ssh.communicate(timeout=20)
    assert ssh.returncode == 255, said
    refused = hosts.run([*hosts.ssh, "hostB", "true"], check=False)
    assert refused.returncode == 255 and "Connection refused" in refused.stderr
    left = hosts.processes("hostB", with_sshd=True).values()
    assert not [line for line in left if line.startswith(("sshd", "/usr/sbin/sshd"))]
    # `cat` has read the end of its input.
    assert hosts.wait_until_idle() == []
    hosts.start_sshd("hostB")
    assert hosts.run([*hosts.ssh, "hostB", "hostname"]).stdout == "hostB\n"


def test_all_is_removed_after_a_failure():
    with pytest.raises(ZeroDivisionError), Hosts(1) as made:
        sleeper = made.start(["sleep", "300"], on="hostA")
        assert wait_for(lambda: "sleep 300" in made.processes("hostA").values())
        files = list(made.directory.iterdir())
        assert any("process" in found for found in made.leftovers()) and len(made.leftovers()) > 5
        raise ZeroDivisionError
    assert sleeper.returncode == -9
    assert made.was_left == ["hostA: sleep 300"]
    assert made.leftovers() == []
    assert files and not any(path.exists() for path in files)


def test_what_killed_sessions_left_is_removed():
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"mpt{gone.pid}-0-hostA"
    subprocess.run(["ip", "netns", "add", name], check=True)
    sleeper = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "300"])
    directory = Path(tempfile.mkdtemp(prefix=f"mpt{gone.pid}-0-"))
    with Hosts(1) as others:
        remove_strays()
        assert others.run(["hostname"], on="hostA").stdout == "hostA\n"
    assert sleeper.wait(timeout=5) == -9
    assert not directory.exists() and not Path("/run/netns", name).exists()


def test_without_root_one_line_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.fail.Exception, match=r"^not root: .*run them as root\.$"):
        need_programs({"sh": "dash"})
