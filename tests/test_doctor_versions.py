"""Doctor on packages: what fits, what is missing, what it means (mempar.tools.doctor versions, packages, apex)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mempar.tools.doctor import apex, packages, versions
from mempar.tools.doctor.finding import Finding
from mempar.tools.doctor.packages import Packages
from mempar.tools.doctor.version_ranges import parse, satisfies

WANTED = tuple(
    found
    for line in (
        "torch", "megatron-core<0.20,>=0.16.1", "einops", "psutil",
        "transformer-engine[pytorch]<2.12,>=2.9; extra == 'gpu'",
    )
    if (found := parse(line))
)  # fmt: skip
GOOD = Packages(
    python="3.11.7",
    python_range=">=3.11",
    versions={
        "torch": "2.13.0", "megatron-core": "0.16.1", "triton": "3.7.1", "transformer-engine": "2.9.0",
        "flash-attn": "2.8.3", "psutil": "7.2.2", "einops": "0.8.2",
    },
    cuda="13.0",
    wanted=WANTED,
    triton_range="==3.7.1",
    compiler="/usr/bin/gcc",
)  # fmt: skip


def without(*names: str, **others: Any) -> Packages:
    kept = {name: version for name, version in GOOD.versions.items() if name not in names}
    return replace(GOOD, versions=kept | others.pop("versions", {}), **others)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    assert all(one.level == "ok" or (one.rule and one.remedy) for one in found)
    return {one.check.removeprefix("versions."): one for one in found}


def test_a_complete_environment_is_ok() -> None:
    assert {one.level for one in versions.check(GOOD)} == {"ok"}


@pytest.mark.parametrize(
    ("there", "check", "level", "what", "remedy"),
    [
        (replace(GOOD, python="3.10.2"), "python", "error", "3.10.2", "Python"),
        (without("torch"), "torch", "error", "not installed", "constraints.txt"),
        (without("megatron-core"), "megatron-core", "error", "not installed", "megatron-core<0.20,>=0.16.1"),
        (without(versions={"megatron-core": "0.20.0"}), "megatron-core", "error", "0.20.0", "pip install"),
        (without("triton"), "triton", "error", "not installed", "triton==3.7.1"),
        (without("triton", cuda=""), "triton", "note", "not installed", "triton==3.7.1"),
        (without(versions={"triton": "3.6.0"}), "triton", "warning", "3.6.0 with torch 2.13.0", "triton==3.7.1"),
        # CPU builds of torch declare nothing; the pairs are known here.
        (without(versions={"triton": "3.6.0"}, triton_range="", cuda=""), "triton", "note", "3.6.0", "==3.7.*"),
        (without(versions={"triton": "3.7.0", "torch": "2.11.0"}, triton_range=""), "triton", "warning", "3.7", "3.6."),
        (replace(GOOD, compiler=""), "compiler", "error", "no a C compiler", "gcc"),
        (replace(GOOD, has_headers=False), "compiler", "error", "Python.h", "python3-dev"),
        (without("transformer-engine"), "transformer-engine", "warning", "not installed", "mempar[gpu]"),
        (without("transformer-engine", cuda=""), "transformer-engine", "note", "not installed", "on a CPU nothing"),
        (replace(GOOD, cuda=""), "transformer-engine", "note", "it is not used", "mempar[gpu]"),
        (without(versions={"transformer-engine": "2.12"}), "transformer-engine", "warning", "2.12", "mempar[gpu]"),
        (without("transformer-engine"), "flash-attn", "note", "without transformer-engine", "mempar[gpu]"),
        (replace(GOOD, apex=(apex.OTHER, False)), "apex", "warning", "not NVIDIA's", "pip uninstall apex"),
        (replace(GOOD, apex=(apex.NVIDIA, False)), "apex", "note", "without its compiled", "build it"),
        (without("psutil"), "others", "error", "psutil", "psutil"),
        (without("psutil", "einops"), "others", "error", "einops, psutil", "einops psutil"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(there: Packages, check: str, level: str, what: str, remedy: str) -> None:
    found = by_name(versions.check(there))[check]
    assert (found.level, what in found.what, remedy in found.remedy) == (level, True, True), found


def test_missing_packages_say_what_becomes_of_a_run() -> None:
    assert "hang" in by_name(versions.check(without("psutil")))["others"].rule


def test_what_a_run_asks_for_decides_how_bad_it_is() -> None:
    there = without("transformer-engine", "triton")
    found = by_name(versions.check(there, context_parallel=2, kernels="torch"))
    assert found["transformer-engine"].level == "error" and "parallel.cp=1" in found["transformer-engine"].remedy
    assert found["triton"].level == "note" and "compiler" not in found
    assert by_name(versions.check(replace(there, cuda=""), kernels="triton"))["triton"].level == "error"


def test_apexes_are_told_apart_by_what_lies_in_them(tmp_path: Path) -> None:
    assert apex.identify([], False) == (apex.NONE, False)
    # The one on PyPI is a toolkit for web applications.
    (tmp_path / "pypi" / "lib").mkdir(parents=True)
    assert apex.identify([tmp_path / "pypi"], True) == (apex.OTHER, False)
    for part in ("optimizers", "normalization", "multi_tensor_apply", "contrib"):
        (tmp_path / "nvidia" / part).mkdir(parents=True)
    assert apex.identify([tmp_path / "nvidia"], False) == (apex.NVIDIA, False)
    assert apex.identify([tmp_path / "nvidia"], True) == (apex.NVIDIA, True)
    assert apex.apex_finding(apex.NVIDIA, True, False).level == "ok"


@pytest.mark.parametrize(
    ("version", "versions", "fits"),
    [
        ("0.16.1", "<0.20,>=0.16.1", True), ("0.20", "<0.20,>=0.16.1", False), ("3.7.1+git5b8", "==3.7.1", True),
        ("3.10", ">=3.11", False), ("3.7.1", "==3.7.*", True), ("3.6.9", "==3.7.*", False), ("3.6.9", "!=3.7.*", True),
        ("2.2", "~=2.1", True), ("3.0", "~=2.1", False), ("2.9", "==2.9.0", True), ("1", "", True), ("1", "odd", True),
        ("2.1", "<=2.0", False), ("2.1", ">2.0", True), ("2.1", "!=2.1", False),
    ],
)  # fmt: skip
def test_ranges_of_versions(version: str, versions: str, fits: bool) -> None:
    assert satisfies(version, versions) is fits


def test_requirements_are_read_as_metadata_writes_them() -> None:
    found = parse("Transformer_Engine[pytorch] (<2.12,>=2.9) ; extra == 'gpu'")
    assert found is not None and found.is_extra
    assert (found.name, found.versions) == ("transformer-engine", "<2.12,>=2.9")
    assert parse("mempar @ file:///somewhere") is None


def test_this_environment_is_read_as_it_is() -> None:
    import torch

    there = packages.collect()
    assert there.versions["torch"] == torch.__version__
    assert there.cuda == (torch.version.cuda or "")
    assert there.range_of("megatron-core")
    found = by_name(versions.check(there))
    assert {found[name].level for name in ("python", "torch", "megatron-core", "triton", "others")} == {"ok"}
