"""Two packages are called apex: NVIDIA's fused optimizers and norms, and an unrelated one on PyPI; neither is imported.

NVIDIA's is not on PyPI, so `pip install apex` brings the other one, which `import apex` in megatron then finds.
"""

import importlib.util
from pathlib import Path

from mempar.tools.doctor.finding import NOTE, OK, WARNING, Finding

NONE, NVIDIA, OTHER = "none", "nvidia", "other"
_CHECK = "versions.apex"
# Folders that NVIDIA's has had since its first version, and its compiled part.
_PARTS = ("optimizers", "normalization", "multi_tensor_apply")
_COMPILED = "amp_C"


def identify(locations: list[Path], has_compiled: bool) -> tuple[str, bool]:
    """Say which apex lies in some folders.

    Args:
        locations: folders of the package `apex`; none if there is none.
        has_compiled: whether its compiled part can be imported.

    Returns:
        `none`, `nvidia` or `other`; and whether its fused kernels were compiled.
    """
    if not locations:
        return NONE, False
    whose = NVIDIA if all(any((path / part).is_dir() for path in locations) for part in _PARTS) else OTHER
    return whose, whose == NVIDIA and has_compiled


def look() -> tuple[str, bool]:
    """`identify` for this environment."""
    found = importlib.util.find_spec("apex")
    locations = [Path(path) for path in (found.submodule_search_locations or [])] if found else []
    if found and not locations and found.origin:
        # A module of that name is no package, and not NVIDIA's.
        locations = [Path(found.origin)]
    return identify(locations, importlib.util.find_spec(_COMPILED) is not None)


def apex_finding(whose: str, is_compiled: bool, has_transformer_engine: bool) -> Finding:
    """Judge the apex that is there."""
    if whose == OTHER:
        return Finding(
            check=_CHECK,
            level=WARNING,
            what="the package apex here is not NVIDIA's but the unrelated one on PyPI",
            rule="megatron takes any package of that name for NVIDIA's fused optimizers and norms, and may fail on it",
            remedy="pip uninstall apex; NVIDIA's comes from https://github.com/NVIDIA/apex and is not needed here",
        )
    if whose == NVIDIA and not is_compiled:
        return Finding(
            check=_CHECK,
            level=NOTE,
            what="NVIDIA's apex is installed without its compiled kernels",
            rule="its fused optimizers need them; megatron then steps with torch's Adam or TransformerEngine's",
            remedy="build it with its CUDA extensions, or pip uninstall apex",
        )
    if whose == NVIDIA:
        return Finding(check=_CHECK, level=OK, what="NVIDIA's apex with its compiled kernels")
    steps = "TransformerEngine's" if has_transformer_engine else "torch's"
    return Finding(check=_CHECK, level=OK, what=f"no apex, and none needed: dense parameters step with {steps} Adam")
