"""The choice of a backend: what was asked for, or an error."""

import importlib.util

import pytest

from mempar.errors import ConfigError
from mempar.kernels.dispatch import BACKENDS, TORCH, choose_backend


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("name", "device_type", "chosen"),
    [("auto", "cpu", "torch"), ("auto", "cuda", "triton"), ("torch", "cuda", "torch"), ("triton", "cuda", "triton")],
)
def test_choice_is_what_was_asked_for(name: str, device_type: str, chosen: str, compiled: None) -> None:
    backend = choose_backend(name, device_type)
    assert (backend.name, backend.check_indices, backend.is_triton) == (chosen, False, chosen == "triton")


def test_triton_on_a_cpu_is_refused_unless_it_is_interpreted(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kernels\.backend=triton on cpu: .*; use kernels\.backend=auto, or set"):
        choose_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", "cpu", check_indices=True).check_indices
    assert choose_backend("auto", "cpu") == TORCH


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_cuda_without_triton_is_refused_and_not_slower(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(
        ConfigError, match=r"triton, which is not installed; .*; install it, or set kernels\.backend=torch"
    ):
        choose_backend(name, "cuda")
    assert choose_backend("torch", "cuda") == TORCH


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"kernels.backend=cuda is not known; it is one of {', '.join(BACKENDS)};"):
        choose_backend("cuda", "cuda")
