"""Letting a model read a text while its lookups are recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.memory.usage import LookupTally
from mempar.tools.inspection.reads import TextReads

if TYPE_CHECKING:
    from mempar.runtime.inference.opened import OpenedModel


class LookupRecord(LookupTally):
    """What the lookups of one window chose, and how they weighed it.

    Attributes:
        lookups: by block the slots `[T, H, K] int64` and their weights `[T, H, K] float64`.
    """

    without_gradients = True

    def __init__(self, config: MemoryConfig, device: torch.device) -> None:
        """Begin with nothing.

        Args:
            config: of the memory.
            device: where its layers compute.
        """
        super().__init__(config.layers, config.heads, device)
        self.lookups: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, block: int, slot_index: Tensor, weight: Tensor) -> None:
        """Record one lookup; see `LookupTally`. A window has one a block."""
        assert block not in self.lookups
        super().add(block, slot_index, weight)
        self.lookups[block] = slot_index.cpu().numpy(), weight.detach().double().cpu().numpy()


def read_windows(
    opened: "OpenedModel", windows: Sequence[Sequence[int]], memories: Sequence[str], advance: Callable[[int], None]
) -> dict[str, TextReads]:
    """Let a model read the windows of a text, each for itself.

    Args:
        opened: the model.
        windows: tokens, at least one each.
        memories: whose lookups are wanted.
        advance: is told how many more windows were read.

    Returns:
        What was read, by the memory's name.

    Raises:
        ConfigError: when the model has diverged.
    """
    reads = {name: TextReads(opened.run.memories[name]) for name in memories}
    for window in windows:
        records = {name: LookupRecord(opened.run.memories[name], opened.device) for name in memories}
        with _recorded(opened, records):
            opened.forward.logits(torch.tensor([list(window)]), last_only=True)
        for name, record in records.items():
            if not record.entropy_sum.isfinite().all():
                raise ConfigError(
                    f"{name} of {opened.checkpoint} gives weights that are not finite: the model has diverged; what it "
                    "reads can be told of one that has not; use an earlier checkpoint, or look at --rows alone."
                )
            reads[name].add(record)
        advance(1)
    return reads


@contextmanager
def _recorded(opened: "OpenedModel", records: dict[str, LookupRecord]) -> Iterator[None]:
    access = opened.model.access
    for name, record in records.items():
        access[name].tally = record
    try:
        yield
    finally:
        for name in records:
            access[name].tally = None
