"""What is installed, as packages' metadata and files say it; neither torch nor megatron nor triton is imported."""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from mempar.tools.doctor import apex
from mempar.tools.doctor.version_ranges import Requirement, normal, parse

_PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "flash-attn", "psutil", "einops")


@dataclass(frozen=True, kw_only=True)
class Packages:
    """What is installed.

    Attributes:
        python: version of Python.
        python_range: what mempar declares of it.
        versions: by the names of distributions; those that are missing are left out.
        cuda: CUDA version that torch was built for; empty for a CPU build.
        wanted: what mempar declares.
        triton_range: what torch declares of triton; empty where it declares nothing.
        apex: `none`, `nvidia` or `other`, and whether its kernels are compiled.
        compiler: path of a C compiler; empty if there is none.
        has_headers: whether Python's C headers are there.
    """

    python: str
    python_range: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    cuda: str = ""
    wanted: tuple[Requirement, ...] = ()
    triton_range: str = ""
    apex: tuple[str, bool] = (apex.NONE, False)
    compiler: str = ""
    has_headers: bool = True

    def range_of(self, name: str) -> str:
        """What mempar declares of a package's versions, extras included."""
        return next((wanted.versions for wanted in self.wanted if wanted.name == name), "")


def collect() -> Packages:
    """Look at this environment."""
    wanted = _requirements("mempar")
    names = {*_PACKAGES, *(one.name for one in wanted if not one.is_extra)}
    versions = {name: version for name in names if (version := _version(name))}
    return Packages(
        python=".".join(map(str, sys.version_info[:3])),
        python_range=_python_range(),
        versions=versions,
        cuda=_cuda_of_torch(),
        wanted=tuple(wanted),
        triton_range=next((one.versions for one in _requirements("torch") if one.name == "triton"), ""),
        apex=apex.look(),
        compiler=next((path for name in ("gcc", "clang", "cc") if (path := shutil.which(name))), ""),
        has_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements(name: str) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires(normal(name)) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [found for line in lines if (found := parse(line)) is not None]


def _python_range() -> str:
    try:
        return importlib.metadata.metadata("mempar")["Requires-Python"] or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def _cuda_of_torch() -> str:
    """CUDA version of torch's build, as its file of versions says it."""
    found = importlib.util.find_spec("torch")
    for folder in (found.submodule_search_locations or []) if found else []:
        try:
            text = Path(folder, "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        said = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
        return said.group(1) if said else ""
    return ""
