"""Hardware descriptions from YAML: what is written is read again, what is wrong is said."""

import dataclasses
from pathlib import Path

import pytest

from mempar.errors import ConfigError
from mempar.runtime.hardware import GPUS
from mempar.runtime.hardware_file import find_hardware, hardware_yaml, load_hardware


@pytest.mark.parametrize("name", GPUS)
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "here.yaml"
    path.write_text(hardware_yaml(GPUS[name]))
    assert load_hardware(path) == find_hardware(str(path)) == find_hardware(name) == GPUS[name]


def test_a_file_may_say_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text("like: h200\nnetwork_gb_per_s: 25\n")
    assert load_hardware(path) == dataclasses.replace(GPUS["h200"], network_gb_per_s=25.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: h200\nmatmul_shar: 0.5\n", "did you mean matmul_share"),
        ("like: h300\n", "'h300' is no known hardware.*did you mean h200"),
        ("like: h200\nmatmul_share: fast\n", "matmul_share='fast' must be a number"),
        ("like: h200\nmatmul_share: true\n", "matmul_share=True must be a number"),
        ("like: h200\ngpus_per_node: 7.5\n", "gpus_per_node=7.5 must be a whole number"),
        ("like: h200\nlink_share: 2\n", "link_share=2.0 must be a positive number of at most 1"),
        ("like: h200\nlabel: 5\n", "label=5 must be a text"),
        ("label: X\n", "memory_bytes, .* are missing"),
        ("like: h200\nlike: h100\n", "like is there twice"),
        ("- a\n", "holds no description"),
        ("a: [\n", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_hardware(path)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(path))


def test_unknown_names_list_near_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean h200"):
        find_hardware("H20")
    with pytest.raises(ConfigError, match="the known ones are a100"):
        find_hardware("quantum")
    with pytest.raises(ConfigError, match="does not exist"):
        find_hardware(str(tmp_path / "none.yaml"))
