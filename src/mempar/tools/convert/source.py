"""Tensors of a model, wherever they come from, under the names and at the shapes that checkpoints give them.

A `Source` is what every format is converted from, and what every format is made of. Others may stand around one, and
leave tensors out, cast them or add some. Names, shapes and numbers are those of checkpoints (manifest.py): logical
tensors, the same in every layout.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import TensorRecord
from mempar.runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class MegatronState:
    """What megatron's own loader finds in a checkpoint beside tensors, and mempar's never opens.

    Attributes:
        common: what all ranks have in common, without tensors of the model.
        objects: other things, serialised, by megatron's keys.
    """

    common: dict[Any, Any]
    objects: dict[str, bytes]


class RowStream(Protocol):
    """Rows of a tensor, one after another."""

    def read(self, target: Tensor) -> None:
        """Fill `[rows, ...]` with the rows that follow those read before.

        Raises:
            CheckpointError: when they are damaged; at the latest when the stream is read to its end.
        """
        ...


class Source(Protocol):
    """A model's tensors and what is known of the run that made them.

    Attributes:
        root: the directory that they come from.
        identity: tells this source from any other one, its content included.
        run: the model, and the run that made it.
        tensors: by name. Digests may be 0 where `has_digests` is False.
        has_digests: whether the records' digests are those of the tensors.
        progress: how far the run was, see `Manifest`.
        about: what else describes it, see `Manifest`.
    """

    root: Path
    identity: str
    run: RunConfig
    tensors: Mapping[str, TensorRecord]
    has_digests: bool
    progress: dict[str, Any]
    about: dict[str, Any]

    def read(self, box: Box, target: Tensor) -> None:
        """Fill a tensor on the CPU with a part of a logical one, from any thread.

        Raises:
            CheckpointError: when it is damaged.
        """
        ...

    def stream(self, name: str, first: int, last: int) -> AbstractContextManager[RowStream]:
        """Rows `[first, last)` of a tensor, for tensors that memory may not hold."""
        ...

    def cuts(self, name: str) -> list[int]:
        """Rows, 0 and the end among them, between which a stream reads nothing that it does not return."""
        ...

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """Bytes that `read` and `stream` of this tensor take at their peak, beside the target.

        Args:
            name: of the tensor.
            at_cuts: whether all steps of a stream begin and end at cuts, so that it keeps nothing for the next one.
        """
        ...

    def megatron(self) -> MegatronState | None:
        """What megatron left in it; None where it did not make it."""
        ...
