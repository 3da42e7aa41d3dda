"""What is said when memory does not suffice for a model, or for what it computes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mempar.errors import ConfigError

# Torch's allocator of the CPU has no exception of its own.
_OF_CPU = "can't allocate memory"
_WANTED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)


@contextmanager
def explained_shortage(checkpoint: str) -> Iterator[None]:
    """Let a lack of memory, of the host or of a GPU, be one message.

    Args:
        checkpoint: whose model is opened or computes.

    Raises:
        ConfigError: instead of what Python or torch raise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        wanted = _WANTED.search(str(error))
        reason = f"{wanted[1]} more were wanted" if wanted else "no more is given"
        raise ConfigError(
            f"there is not memory enough for {checkpoint} ({reason}); all of the model but mapped tables is in memory, "
            "and so is what a batch takes; where the command has them use --tables mapped, a smaller --batch-size and "
            "fewer --nproc, or a shorter text; or see to it that more memory is free."
        ) from None


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _OF_CPU in str(error)
    )
