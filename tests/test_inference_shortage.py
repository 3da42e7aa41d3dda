"""Memory that does not suffice is one message, whoever finds it out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mempar.errors import ConfigError
from mempar.runtime.inference.shortage import explained_shortage


def on_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize(
    ("take", "wanted"),
    [
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "1152921504606846976 bytes more were wanted"),
        (lambda: np.empty(1 << 60, np.uint8), "1.00 EiB more were wanted"),
        (lambda: bytearray(1 << 60), "no more is given"),
        (on_gpu, "20.00 MiB more were wanted"),
    ],
    ids=["torch", "numpy", "python", "gpu"],
)
def test_shortage_is_one_message(take: Callable[[], Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"not memory enough for toy \({wanted}\).*--tables mapped") as raised:  # noqa: SIM117
        with explained_shortage("toy"):
            take()
    assert raised.value.exit_status == 2 and "\n" not in str(raised.value)


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), ConfigError("not this"), KeyError("x")):
        with pytest.raises(type(error), match=str(error)), explained_shortage("toy"):
            raise error
