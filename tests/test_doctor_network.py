"""Doctor on interfaces, names and InfiniBand (mempar.tools.doctor network, interfaces)."""

from dataclasses import replace

import pytest

from mempar.tools.doctor import environment, interfaces, network
from mempar.tools.doctor.environment import NetworkSettings
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.interfaces import Interface, Network

LO = Interface(name="lo", addresses=("127.0.0.1", "::1"), mtu=65536)
ETH = Interface(name="eth0", addresses=("10.0.0.7",), mbit_per_s=100_000, mtu=9000)
GOOD = Network(
    interfaces=(LO, ETH),
    hostname="node7",
    host_addresses=("10.0.0.7",),
    route="eth0",
    peer="node8",
    infiniband={"mlx5_0": "ACTIVE", "mlx5_1": "ACTIVE"},
    settings=NetworkSettings(),
)


def look(there: Network, backend: str = "nccl", num_nodes: int = 2) -> dict[str, Finding]:
    found = network.check(there, backend=backend, num_nodes=num_nodes)
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return {one.check.removeprefix("network."): one for one in found}


def test_a_connected_machine_is_ok() -> None:
    found = look(GOOD)
    assert {one.level for one in found.values()} == {"ok"}
    assert "eth0 (10.0.0.7, 100 Gb/s, MTU 9000) leads to node8" in found["interfaces"].what


def test_a_name_that_leads_back_to_its_own_machine() -> None:
    debian = replace(GOOD, host_addresses=("127.0.1.1",))
    found = look(debian)["hostname"]
    assert found.level == "error" and "127.0.1.1" in found.what and "GLOO_SOCKET_IFNAME=eth0" in found.remedy
    assert look(debian, num_nodes=1)["hostname"].level == "note"
    chosen = replace(debian, settings=NetworkSettings(gloo_interfaces="eth0"))
    assert look(chosen)["hostname"].level == "note"
    assert look(replace(GOOD, host_addresses=()))["hostname"].level == "error"
    stale = look(replace(GOOD, host_addresses=("10.9.9.9",)))["hostname"]
    assert stale.level == "error" and "which no interface here has" in stale.what


@pytest.mark.parametrize(
    ("gloo", "nccl", "backend", "levels"),
    [
        ("eth0", "eth", "nccl", {"GLOO_SOCKET_IFNAME": "ok", "NCCL_SOCKET_IFNAME": "ok"}),
        ("eth1", "", "nccl", {"GLOO_SOCKET_IFNAME": "error"}),
        ("eth0,ib0", "", "gloo", {"GLOO_SOCKET_IFNAME": "error"}),
        ("", "ib,enp", "nccl", {"NCCL_SOCKET_IFNAME": "error"}),
        ("", "ib", "gloo", {"NCCL_SOCKET_IFNAME": "warning"}),
        ("", "=eth", "nccl", {"NCCL_SOCKET_IFNAME": "error"}),
        ("", "=eth0", "nccl", {"NCCL_SOCKET_IFNAME": "ok"}),
        ("", "^docker,lo", "nccl", {"NCCL_SOCKET_IFNAME": "ok"}),
    ],
)
def test_interfaces_that_variables_name(gloo: str, nccl: str, backend: str, levels: dict[str, str]) -> None:
    settings = NetworkSettings(gloo_interfaces=gloo, nccl_interfaces=nccl)
    found = look(replace(GOOD, settings=settings), backend)
    named = {check: one for check, one in found.items() if check.endswith("IFNAME")}
    assert {check: one.level for check, one in named.items()} == levels
    assert all("eth0" in one.remedy for one in named.values() if one.level != "ok")


def test_no_way_to_other_hosts() -> None:
    alone = replace(GOOD, interfaces=(LO, replace(ETH, is_up=False)), route="", infiniband={})
    assert look(alone)["interfaces"].level == "error" and "no way to node8" in look(alone)["interfaces"].what
    assert look(alone, num_nodes=1)["interfaces"].level == "note"


def test_slow_links_and_small_packets_matter_between_hosts() -> None:
    def with_link(link: Interface) -> Network:
        return replace(GOOD, interfaces=(LO, link), infiniband={})

    slow = with_link(replace(ETH, mbit_per_s=1000))
    assert look(slow)["interfaces"].level == "warning" and "1 Gb/s" in look(slow)["interfaces"].what
    assert look(slow, num_nodes=1)["interfaces"].level == "ok"
    assert look(with_link(replace(ETH, mtu=1500)))["interfaces"].level == "note"
    assert look(with_link(replace(ETH, mbit_per_s=0)))["interfaces"].level == "ok"


def test_infiniband() -> None:
    none = look(replace(GOOD, infiniband={}))["infiniband"]
    assert none.level == "warning" and "/dev/infiniband" in none.remedy
    assert "infiniband" not in look(replace(GOOD, infiniband={}), "gloo")
    down = look(replace(GOOD, infiniband={"mlx5_0": "ACTIVE", "mlx5_1": "DOWN"}))["infiniband"]
    assert down.level == "warning" and "mlx5_1 (DOWN)" in down.what
    off = look(replace(GOOD, settings=NetworkSettings(infiniband_off=True)))["infiniband"]
    assert off.level == "warning" and "unset NCCL_IB_DISABLE" in off.remedy


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    there = interfaces.collect(environment.network_settings(), ())
    assert any(one.is_loopback and "127.0.0.1" in one.addresses for one in there.interfaces)
    assert there.peer == "127.0.0.1" and there.route == "lo" and there.hostname
    assert look(there)["GLOO_SOCKET_IFNAME"].level == "error"


def test_what_a_scheduler_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    assert environment.allocation().job == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "99999999999")
    job = environment.allocation()
    assert job.num_nodes == 4 and job.seconds_left is not None and job.seconds_left > 1e9
    for text, seconds in (("1-02:03:04", 93784.0), ("59:01", 3541.0), ("30", 30.0), ("UNLIMITED", None), ("", None)):
        assert environment.parse_days(text) == seconds
