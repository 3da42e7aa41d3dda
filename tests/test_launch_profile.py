"""Launch profiles: what is read is what was written, and what no script could hold is refused by name."""

import dataclasses
import sys
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.tools.launch.profile import LaunchProfile, SlurmConfig, SshConfig, seconds_of, with_flags
from mempar.tools.launch.profile_file import known_names, profile_yaml, read_profile

EVERYTHING = """
env: {NCCL_DEBUG: WARN, NUMBER: 007, TRUTH: no, EMPTY: ""}
modules: [cuda/12.8, 2024]
setup: ["ulimit -l unlimited", "source /opt/site.sh"]
python: /shared/venv/bin/python
workdir: /shared
nproc_per_node: 8
interface: ib0
rendezvous_seconds: 900
slurm:
  partition: gpu
  account: 1234
  time: 24:00:00
  cpus_per_task: 96
  exclusive: no
  requeue: true
  signal_seconds: 600
  extra: [--mail-type=END]
ssh:
  user: trainer
  port: 2222
  options: [StrictHostKeyChecking=accept-new]
"""


def read(tmp_path: Path, text: str) -> LaunchProfile:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    return read_profile(path)


def test_values_are_read_as_they_are_written(tmp_path: Path):
    profile = read(tmp_path, EVERYTHING)
    assert profile.env == {"NCCL_DEBUG": "WARN", "NUMBER": "007", "TRUTH": "no", "EMPTY": ""}
    assert profile.modules == ("cuda/12.8", "2024") and profile.nproc_per_node == 8
    assert profile.slurm == SlurmConfig(
        partition="gpu",
        account="1234",
        time="24:00:00",
        cpus_per_task=96,
        exclusive=False,
        signal_seconds=600,
        extra=("--mail-type=END",),
    )
    assert profile.ssh == SshConfig(user="trainer", port=2222, options=("StrictHostKeyChecking=accept-new",))


def test_what_is_written_is_read_again(tmp_path: Path):
    profile = read(tmp_path, EVERYTHING)
    assert read(tmp_path, profile_yaml(profile)) == profile
    assert read(tmp_path, profile_yaml(LaunchProfile())) == LaunchProfile()
    assert read(tmp_path, "") == read(tmp_path, "slurm:\nssh: ~\npython: null\n") == LaunchProfile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: [a]", r"'modles' is no setting of a launch profile; .*did you mean modules"),
        ("partition: gpu", r"'partition' is no setting .* did you mean slurm\.partition"),
        ("slurm: {partiton: gpu}", r"'slurm\.partiton' is no setting .* did you mean slurm\.partition"),
        ("zzz: 1", r"'zzz' is no setting .*; the settings are env, modules"),
        ("slurm: gpu", r"slurm is a section of settings; write slurm: \{NAME: VALUE\}"),
        ("nproc_per_node: eight", r"nproc_per_node must be a whole number, and 'eight' is none"),
        ("slurm: {requeue: maybe}", r"slurm\.requeue must be true or false, and 'maybe' is none"),
        ("python: [a]", r"python must be a text, and \['a'\] is none"),
        ("modules: cuda", r"modules is a list of texts"),
        ("modules: [{a: b}]", r"modules is a list of texts"),
        ("env: [A]", r"env is a mapping of names to texts"),
        ("env: {1A: b}", r"env holds '1A', which is no name of a variable"),
        ("env: {'A;B': b}", r"env holds 'A;B'"),
        ("python: a\npython: b", r"python is there twice"),
        ("- a", r"holds no settings"),
        ("a: [", r"cannot be read as YAML"),
        ('python: "a\\nb"', r"python holds 'a\\nb'; a value is one line"),
        ('setup: ["a\\nb"]', r"setup holds"),
        ('slurm: {partition: "a\\nb"}', r"slurm\.partition holds"),
        ('env: {A: "a\\0b"}', r"env holds"),
        ("nproc_per_node: 0", r"nproc_per_node=0 must be at least 1"),
        ("slurm: {gpu_option: gpus}", r"slurm\.gpu_option=gpus is not known; .*gres, gpus-per-node, none"),
        ("slurm: {time: a day}", r"slurm\.time='a day' is no time limit"),
        ("slurm: {time: 5, signal_seconds: 300}", r"slurm\.signal_seconds=300 is too much for slurm\.time=5, 300 s"),
        ("slurm: {time: 5, signal_seconds: 240}", r"signal_seconds=240 is too much .* SLURM may say so 60 s earlier"),
        ("slurm: {signal_seconds: 65536}", r"slurm\.signal_seconds=65536 must be from 1 to 65535"),
        ("slurm: {extra: [mail]}", r"slurm\.extra holds 'mail'"),
        ("ssh: {port: 70000}", r"ssh\.port=70000 must be from 0 to 65535"),
        ("ssh: {user: -oProxyCommand=x}", r"ssh\.user=-oProxyCommand=x begins with a dash"),
        ("interface: ib0;x", r"interface='ib0;x' is no name of a network interface"),
    ],
)
def test_bad_profiles_are_refused_by_name(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "profile.yaml"))
    assert "\n" not in str(raised.value)


def test_missing_profile_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist; --profile names a launch profile"):
        read_profile(tmp_path / "missing.yaml")


def test_known_names_are_all_there_are():
    names = known_names()
    assert {"env", "slurm.partition", "ssh.connect_timeout"} <= set(names)
    inner = len(dataclasses.fields(SlurmConfig)) + len(dataclasses.fields(SshConfig))
    assert len(names) == len(dataclasses.fields(LaunchProfile)) - 2 + inner


def test_flags_come_before_the_profile(tmp_path: Path):
    profile = read(tmp_path, EVERYTHING)
    assert with_flags(profile) == profile
    changed = with_flags(
        profile, partition="", account="b", time="1-0", container_image="i", modules=["m"], env=["A=b=c", "TRUTH=yes"]
    )
    assert changed.slurm == dataclasses.replace(
        profile.slurm, partition="", account="b", time="1-0", container_image="i"
    )
    assert changed.modules == ("m",)
    assert changed.env == {**profile.env, "A": "b=c", "TRUTH": "yes"}
    with pytest.raises(ConfigError, match="--env A has no ="):
        with_flags(profile, env=["A"])
    with pytest.raises(ConfigError, match=r"slurm\.time='x' is no time limit"):
        with_flags(profile, time="x")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-1:1:1", 90061), ("1-0:30", 88200)],
)
def test_time_limits_are_read_as_sbatch_does(time: str, seconds: int):
    assert seconds_of(time) == seconds
    assert seconds_of("infinite") == seconds_of("0") == seconds_of("") == float("inf")


def test_interface_is_that_of_all_sockets():
    profile = LaunchProfile(interface="ib0", env={"NCCL_SOCKET_IFNAME": "=ib1"})
    assert profile.environment == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib1",
        "TP_SOCKET_IFNAME": "ib0",
    }
    assert LaunchProfile().environment == {}
    assert LaunchProfile().interpreter == sys.executable
    assert LaunchProfile(slurm=SlurmConfig(container_image="i")).interpreter == "python3"
