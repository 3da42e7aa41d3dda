"""`mempar doctor` on the nodes of a launch: over ssh on two hosts, and as a step of two SLURM nodes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import mempar
from hosts import Hosts
from runs import MEMPAR, wait_until
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster
# The sources under test, wherever the interpreter would find others.
ENVIRONMENT = f"env: {{OMP_NUM_THREADS: 1, PYTHONPATH: {Path(mempar.__file__).parents[1]}}}\n"
Findings = dict[str, list[dict[str, Any]]]


def found_by(process: "subprocess.Popen[str]", seconds: float = 120.0) -> tuple[int, Findings]:
    said, complaints = process.communicate(timeout=seconds)
    assert not complaints, complaints
    findings: Findings = {}
    for finding in json.loads(said):
        findings.setdefault(finding["check"], []).append(finding)
    return process.returncode, findings


def errors(findings: Findings) -> set[str]:
    return {check for check, found in findings.items() for one in found if one["level"] == "error"}


def test_hosts_are_looked_at_over_ssh(hosts: Hosts, tmp_path: Path) -> None:
    [_, config] = hosts.ssh_options
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"ssh: {{config: {config}, connect_timeout: 4}}\n{ENVIRONMENT}")
    out = tmp_path / "run"
    where = ["--on", "ssh", "--hostfile", str(hosts.hostfile(slots=1)), "--profile", str(profile), "--out", str(out)]
    command = [*MEMPAR, "doctor", *where, "--json"]
    status, findings = found_by(hosts.start(command, stderr=subprocess.PIPE))
    assert errors(findings) == set() and status == 0, findings
    (tried,) = findings["smoke.collectives"]
    assert tried["level"] == "ok" and tried["values"]["hosts"] == ["hostA", "hostB"]
    (skew,) = findings["clocks.skew"]
    # One machine has one clock.
    assert skew["level"] == "ok" and all(abs(offset) < 0.5 for offset in skew["values"]["offsets"].values())
    # What is the same on both is said once.
    (torch,) = findings["versions.torch"]
    assert torch["nodes"] == []
    # Interrupted while ranks try collectives: nothing stays.
    second = hosts.start(command, stderr=subprocess.PIPE)
    assert wait_until(lambda: any("smoke_rank" in line for line in hosts.processes("hostB").values()), 60.0)
    second.send_signal(signal.SIGINT)
    said = second.communicate(timeout=30.0)
    assert second.returncode == 130 and "Traceback" not in said[1], said
    assert hosts.wait_until_idle() == []
    # A link is down: its host is named, the other one is looked at.
    hosts.drop_link("hostB")
    status, findings = found_by(hosts.start(command, stderr=subprocess.PIPE))
    assert status == 1 and errors(findings) == {"nodes.reached"}, findings
    (reached,) = findings["nodes.reached"]
    assert reached["values"]["nodes"] == ["hostB"] and "hostB: ssh: connect to host" in reached["what"]
    assert findings["versions.torch"][0]["nodes"] == [] and "not tried out" in findings["smoke.collectives"][0]["what"]
    assert hosts.wait_until_idle() == []
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]


@pytest.mark.parametrize("allocation", [[], ["salloc", "--quiet", "--nodes=2"]], ids=["its own", "around it"])
def test_nodes_of_a_job_are_looked_at(slurm: SlurmCluster, tmp_path: Path, allocation: list[str]) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"slurm: {{exclusive: false, gpu_option: none, partition: low}}\n{ENVIRONMENT}")
    where = ["--on", "slurm", "--nproc", "1", "--profile", str(profile), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*allocation, *MEMPAR, "doctor", *where, *([] if allocation else ["--nodes", "2"]), "--json"],
        env=slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    status, findings = found_by(process)
    # Their addresses are both this machine's loopback.
    assert errors(findings) <= {"network.interfaces"}, findings
    assert status == bool(errors(findings))
    (tried,) = findings["smoke.collectives"]
    assert tried["level"] == "ok" and tried["values"]["hosts"] == ["n1", "n2"]
    assert findings["clocks.skew"][0]["level"] == "ok" and findings["nodes.directory"][0]["level"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]
