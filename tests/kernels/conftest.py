"""One text of tests, three ways to run it: torch's operators, Triton's interpreter, and kernels on a GPU.

pytest tests/kernels                          torch on the CPU
TRITON_INTERPRET=1 pytest tests/kernels       the kernels in Triton's interpreter, on the CPU
pytest tests/kernels --device cuda            the kernels on a GPU
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mempar.kernels.dispatch import Backend, choose_backend, interpreted


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Compile where nothing runs: interpreted kernels cannot be, and a GPU has better to do."""
    elsewhere = interpreted() or config.getoption("device") != "cpu"
    return True if elsewhere and collection_path.name == "test_compiled.py" else None


@pytest.fixture(autouse=True)
def device(pytestconfig: pytest.Config) -> Iterator[torch.device]:
    """Where tensors are made."""
    device = torch.device(pytestconfig.getoption("device"))
    with device:
        yield device


@pytest.fixture(autouse=True)
def seeded(device: torch.device) -> None:
    """Draw afresh."""
    # Shown by pytest when a test fails; torch.manual_seed(it) repeats the test.
    print(f"torch seed {torch.seed()}")


@pytest.fixture
def backend(device: torch.device) -> Backend:
    """What is tested."""
    return choose_backend("triton" if interpreted() else "auto", device.type)


@pytest.fixture
def checking(backend: Backend) -> Backend:
    """The same, looking for row ids out of range."""
    return Backend(name=backend.name, check_indices=True)
