"""Packages: whether they fit each other, and what those that are there or missing mean for the engine."""

from mempar.tools.doctor import apex
from mempar.tools.doctor.finding import ERROR, NOTE, OK, WARNING, Finding
from mempar.tools.doctor.packages import Packages
from mempar.tools.doctor.version_ranges import release, satisfies

# What torch's CUDA builds declare; its CPU builds declare no triton (PyPI, 2026-11).
_TRITON_OF_TORCH: dict[tuple[int, ...], str] = {(2, 11): "3.6.", (2, 13): "3.7."}
# What becomes of a run without them, of those that nobody would expect to matter.
_WITHOUT = {
    "psutil": "megatron's checkpoint writers hang without it",
    "einops": "megatron-core imports it without declaring it",
}


def check(packages: Packages, *, context_parallel: int = 1, kernels: str = "auto") -> list[Finding]:
    """Judge what is installed.

    Args:
        packages: that.
        context_parallel: size that a run wants; above 1 needs TransformerEngine.
        kernels: `auto`, `triton` or `torch`, as kernels.backend.
    """
    whose, is_compiled = packages.apex
    return [
        _python(packages),
        _torch(packages),
        _megatron(packages),
        _triton(packages, kernels),
        *_compiler(packages, kernels),
        _transformer_engine(packages, context_parallel),
        *_flash_attention(packages),
        apex.apex_finding(whose, is_compiled, _uses_transformer_engine(packages)),
        *_missing(packages),
    ]


def _python(packages: Packages) -> Finding:
    if satisfies(packages.python, packages.python_range):
        return Finding(check="versions.python", level=OK, what=f"Python {packages.python}")
    return Finding(
        check="versions.python",
        level=ERROR,
        what=f"Python {packages.python}",
        rule=f"mempar needs Python {packages.python_range}",
        remedy="make the environment anew with such a Python",
    )


def _torch(packages: Packages) -> Finding:
    version = packages.versions.get("torch")
    if version is None:
        return Finding(
            check="versions.torch",
            level=ERROR,
            what="torch is not installed",
            rule="everything that trains needs it",
            remedy="pip install -c constraints.txt mempar; constraints.txt says how to choose between builds",
        )
    build = f"built for CUDA {packages.cuda}" if packages.cuda else "built for CPUs"
    return Finding(check="versions.torch", level=OK, what=f"torch {version}, {build}", values={"cuda": packages.cuda})


def _megatron(packages: Packages) -> Finding:
    version, wanted = packages.versions.get("megatron-core"), packages.range_of("megatron-core")
    if version is not None and satisfies(version, wanted):
        return Finding(check="versions.megatron-core", level=OK, what=f"megatron-core {version}")
    return Finding(
        check="versions.megatron-core",
        level=ERROR,
        what=f"megatron-core {version or 'is not installed'}",
        rule=f"the engine is written for megatron-core {wanted or 'as it declares'} and mends parts of it",
        remedy=f"pip install 'megatron-core{wanted}' -c constraints.txt",
    )


def _triton(packages: Packages, kernels: str) -> Finding:
    version, torch = packages.versions.get("triton"), packages.versions.get("torch", "")
    needed = kernels == "triton" or (kernels == "auto" and bool(packages.cuda))
    pair = packages.triton_range or _pair_of(torch)
    if version is None:
        return Finding(
            check="versions.triton",
            level=ERROR if needed else NOTE,
            what="triton is not installed",
            rule="fused kernels are Triton's" + ("" if needed else "; on a CPU torch's operators stand for them"),
            remedy=f"pip install 'triton{pair}'" + (", or kernels.backend=torch" if needed else " to test kernels"),
        )
    if satisfies(version, pair):
        known = "" if pair else f"; which one torch {torch} pairs with is not known here"
        return Finding(check="versions.triton", level=OK, what=f"triton {version} with torch {torch}{known}")
    return Finding(
        check="versions.triton",
        level=WARNING if needed else NOTE,
        what=f"triton {version} with torch {torch}",
        rule=f"torch {torch} pairs with triton {pair}; with others kernels may fail to compile",
        remedy=f"pip install 'triton{pair}'",
    )


def _pair_of(torch: str) -> str:
    prefix = _TRITON_OF_TORCH.get(release(torch)[:2])
    return f"=={prefix}*" if prefix else ""


def _compiler(packages: Packages, kernels: str) -> list[Finding]:
    if "triton" not in packages.versions or not packages.cuda or kernels == "torch":
        return []
    if packages.compiler and packages.has_headers:
        return [Finding(check="versions.compiler", level=OK, what=f"C compiler {packages.compiler}, Python's headers")]
    missing = " and ".join(
        name for name, there in (("a C compiler", packages.compiler), ("Python.h", packages.has_headers)) if not there
    )
    return [
        Finding(
            check="versions.compiler",
            level=ERROR,
            what=f"no {missing} here",
            rule="Triton compiles a small launcher in C for every kernel when it first runs, on every machine",
            remedy="install gcc and Python's development files (python3-dev) on all machines, or kernels.backend=torch",
        )
    ]


def _uses_transformer_engine(packages: Packages) -> bool:
    return "transformer-engine" in packages.versions and bool(packages.cuda)


def _transformer_engine(packages: Packages, cp: int) -> Finding:
    name = "versions.transformer-engine"
    version, wanted = packages.versions.get("transformer-engine"), packages.range_of("transformer-engine")
    install = "pip install 'mempar[gpu]' on a machine with a GPU"
    if not _uses_transformer_engine(packages):
        there = f"transformer-engine {version} with a CPU build of torch: it is not used" if version else ""
        return Finding(
            check=name,
            level=ERROR if cp > 1 else WARNING if packages.cuda else NOTE,
            what=there or "transformer-engine is not installed",
            rule="without it there is no context parallelism, and blocks are megatron's local ones, whose attention is "
            "not fused" + (f"; parallel.cp={cp} is refused" if cp > 1 else ""),
            remedy=install + (", or parallel.cp=1" if cp > 1 else "" if packages.cuda else "; on a CPU nothing"),
        )
    if satisfies(str(version), wanted):
        return Finding(check=name, level=OK, what=f"transformer-engine {version}: fused blocks, context parallelism")
    return Finding(
        check=name,
        level=WARNING,
        what=f"transformer-engine {version}",
        rule=f"megatron-core declares {wanted}; others may be refused, or compute with other settings",
        remedy=install,
    )


def _flash_attention(packages: Packages) -> list[Finding]:
    version = packages.versions.get("flash-attn")
    if not packages.cuda:
        return []
    if _uses_transformer_engine(packages):
        what = f"flash-attn {version}" if version else "no flash-attn: TransformerEngine attends with cuDNN's kernels"
        return [Finding(check="versions.flash-attn", level=OK, what=what)]
    if version is None:
        return []
    return [
        Finding(
            check="versions.flash-attn",
            level=NOTE,
            what=f"flash-attn {version} without transformer-engine",
            rule="only TransformerEngine's attention uses it",
            remedy="pip install 'mempar[gpu]' for fused attention",
        )
    ]


def _missing(packages: Packages) -> list[Finding]:
    """What mempar declares and is not there; what has a finding of its own is left out."""
    always = [one for one in packages.wanted if not one.is_extra and one.name not in ("torch", "megatron-core")]
    missing = [one.name for one in always if one.name not in packages.versions]
    if not missing:
        return [Finding(check="versions.others", level=OK, what=f"the other {len(always)} packages are there")]
    reasons = [_WITHOUT[name] for name in missing if name in _WITHOUT]
    return [
        Finding(
            check="versions.others",
            level=ERROR,
            what=f"not installed: {', '.join(missing)}",
            rule="; ".join(["mempar declares them as needed", *reasons]),
            remedy=f"pip install -c constraints.txt {' '.join(missing)}",
            values={"missing": missing},
        )
    ]
