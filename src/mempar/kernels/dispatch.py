"""Which implementation of the operations runs: Triton's fused kernels or torch's own operators.

The choice is made once, from the run's settings, and handed down; no operation chooses for itself, and none falls back.
Triton is imported only where it was chosen: torch's builds for CPUs come without it.
"""

import importlib.util
import os
from dataclasses import dataclass

from mempar.errors import ConfigError

BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An implementation that was chosen.

    Attributes:
        name: `triton` or `torch`.
        check_indices: whether operations look for row ids out of range before they read, which makes the host wait.
    """

    name: str
    check_indices: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no implementation."""
        if self.name not in ("triton", "torch"):
            raise ValueError(f"a backend is named triton or torch, not {self.name}; choose_backend resolves auto.")

    @property
    def is_triton(self) -> bool:
        """Whether fused kernels run."""
        return self.name == "triton"


TORCH = Backend(name="torch")


def choose_backend(name: str, device_type: str, *, check_indices: bool = False) -> Backend:
    """Choose for one rank; `auto` is triton on CUDA and torch elsewhere.

    Args:
        name: one of `BACKENDS`.
        device_type: of the device where the tensors lie, `cuda` or `cpu`.
        check_indices: see `Backend`.

    Raises:
        ConfigError: triton was chosen, by name or by `auto`, and cannot run.
    """
    if name not in BACKENDS:
        raise ConfigError(f"kernels.backend={name} is not known; it is one of {', '.join(BACKENDS)}; use one of these.")
    if name == "auto":
        name = "triton" if device_type == "cuda" else "torch"
    if name == "triton":
        _check_triton(device_type)
    return Backend(name=name, check_indices=check_indices)


def _check_triton(device_type: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "the fused kernels need triton, which is not installed; torch's CUDA builds bring it; install it, or set "
            "kernels.backend=torch for the slower operators of torch."
        )
    if device_type != "cuda" and not interpreted():
        raise ConfigError(
            f"kernels.backend=triton on {device_type}: Triton's kernels run on CUDA devices; use kernels.backend=auto, "
            "or set TRITON_INTERPRET=1 in the environment to interpret them, thousands of times slower."
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; it is decided when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
