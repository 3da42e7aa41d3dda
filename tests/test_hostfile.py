"""Hostfiles: what is read, what is refused with the line's number, and which hosts are chosen."""

from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.tools.launch.hostfile import Host, check_host_name, choose_hosts, read_hostfile

PATH = Path("hosts")
# Options, what a shell or ssh reads otherwise, and signs at the ends.
OPTIONS = ["-a", "--", "-oProxyCommand=x"]
READ_OTHERWISE = [f"a{sign}b" for sign in ";$`|&'\"\\/:%@ \n\0(){}[]<>*?!~#=,+^ö"]
AT_THE_ENDS = [".a", "a.", "a-", "_a", "a\n", "*", "[::1]", ""]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    return str(caught.value).replace(str(path), "hosts")


def host(name: str, slots: int) -> Host:
    return Host(name=name, slots=slots)


def test_hostfile_with_comments_and_blank_lines(tmp_path: Path):
    text = "# rack 3\n\n  node-1 \t slots=8   # the first\nnode_2.example.org slots=16\r\n\t\n10.0.0.3 slots=1"
    path = write(tmp_path, text)
    assert read_hostfile(path) == (host("node-1", 8), host("node_2.example.org", 16), host("10.0.0.3", 1))


def test_hostfile_with_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "hosts"
    path.write_bytes(b"\xef\xbb\xbfa slots=2\n")
    assert read_hostfile(path) == (host("a", 2),)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a slots=8\n\nb slots=8\na slots=4\n", ["hosts, line 4", "'a'", "line 1", "remove one"]),
        ("a slots=8\nA slots=8\n", ["hosts, line 2", "'A'", "line 1"]),
        ("# x\na\n", ["hosts, line 2", "'a' has no slots", "write a slots=8"]),
        ("a slots=0\n", ["hosts, line 1", "'slots=0'", "from 1 to 9999"]),
        ("a slots=-1\n", ["hosts, line 1", "'slots=-1'"]),
        ("a slots=eight\n", ["hosts, line 1", "'slots=eight'"]),
        ("a slots=²\n", ["hosts, line 1", "'slots=²'"]),
        (f"a slots={'9' * 5000}\n", ["hosts, line 1", "from 1 to 9999"]),
        ("a slots = 8\n", ["hosts, line 1", "'slots'", "without blanks"]),
        ("a slot=8\n", ["hosts, line 1", "'slot=8'"]),
        ("a 8\n", ["hosts, line 1", "'8'"]),
        ("a slots=8 max_slots=8\n", ["hosts, line 1", "'max_slots=8'", "put # before it"]),
        ("slots=8\n", ["hosts, line 1", "'slots=8' is no host name"]),
        ("a slots=8\n-oProxyCommand=reboot slots=8\n", ["hosts, line 2", "'-oProxyCommand=reboot' is no host name"]),
        ("ada@a slots=8\n", ["hosts, line 1", "'ada@a' is no host name", "set the user in ssh's own config"]),
        ("", ["hosts names no host", "node1 slots=8"]),
        ("# a slots=8\n\n", ["hosts names no host"]),
    ],
)
def test_hostfile_that_is_wrong(tmp_path: Path, text: str, parts: list[str]):
    said = refusal(tmp_path, text)
    assert all(part in said for part in parts), said
    assert "\n" not in said
    assert said.count(";") >= 1 and said.endswith(".")


def test_hostfile_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_hostfile(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_hostfile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize("name", [*OPTIONS, *READ_OTHERWISE, *AT_THE_ENDS, "a" * 254])
def test_names_that_ssh_must_not_see(name: str):
    with pytest.raises(ConfigError, match="is no host name") as caught:
        check_host_name(name, "here")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a", "A1", "gpu-node_7.example.org", "10.1.2.3", "a" * 253])
def test_names_that_are_hosts(name: str):
    check_host_name(name, "here")


def test_the_first_hosts_are_chosen():
    hosts = [host("a", 8), host("b", 8), host("c", 4)]
    assert choose_hosts(hosts, PATH, nodes=2) == (host("a", 8), host("b", 8))
    assert choose_hosts(hosts, PATH, nodes=1, per_node=3) == (host("a", 3),)
    assert choose_hosts(hosts, PATH, per_node=4) == (host("a", 4), host("b", 4), host("c", 4))
    assert choose_hosts(hosts[:2], PATH) == tuple(hosts[:2])


@pytest.mark.parametrize(
    ("nodes", "per_node", "parts"),
    [
        (4, None, ["--nodes=4", "hosts names 3", "--nodes 3"]),
        (0, None, ["--nodes=0", "at least 1"]),
        (1, -1, ["--nproc-per-node=-1", "at least 1"]),
        (3, None, ["a slots=8, b slots=8, c slots=4", "--nproc-per-node 4"]),
        (None, 8, ["--nproc-per-node=8", "hosts has c slots=4", "--nproc-per-node 4"]),
        (2, 9, ["--nproc-per-node=9", "a slots=8, b slots=8", "--nproc-per-node 8"]),
    ],
)
def test_more_than_there_is(nodes: int | None, per_node: int | None, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        choose_hosts([host("a", 8), host("b", 8), host("c", 4)], PATH, nodes=nodes, per_node=per_node)
    said = str(caught.value)
    assert all(part in said for part in parts), said


def test_long_lists_are_cut():
    hosts = [host(f"n{index}", index + 1) for index in range(100)]
    with pytest.raises(ConfigError, match="n3 slots=4 and 96 more"):
        choose_hosts(hosts, PATH)
