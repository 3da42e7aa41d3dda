"""A part of a source: its weights alone, or its weights in another precision."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mempar.errors import ConfigError
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import HISTORY_SINCE, WEIGHTS, TensorRecord
from mempar.runtime.config import RunConfig
from mempar.tools.convert.source import MegatronState, RowStream, Source

# As `train.dtype` spells them.
DTYPES = {"float32": "float32", "bf16": "bfloat16", "float64": "float64"}
# What a run that begins with weights has behind it.
_NO_PROGRESS = {"step": 0, "applied_steps": 0}
# Bytes that are cast at a time, if a row is not longer.
_CAST_BYTES = 1 << 24
# What is said of a run's state, which weights are without.
_OF_STATE = (HISTORY_SINCE,)


class Weights:
    """The weights of a source, where training begins anew; see `Source`."""

    def __init__(self, source: Source, dtype: str = "") -> None:
        """Choose them.

        Args:
            source: where they come from.
            dtype: to cast them to, as `train.dtype` spells it; empty leaves them as they are.

        Raises:
            ConfigError: when there is no such precision.
        """
        if dtype and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype} is not known; it is one of {', '.join(DTYPES)}; use one of these.")
        self._source = source
        self.root, self.identity = source.root, f"{source.identity} weights {dtype}"
        self.has_digests = source.has_digests and not dtype
        self.run: RunConfig = _in_precision(source.run, dtype) if dtype else source.run
        self.tensors: Mapping[str, TensorRecord] = {
            name: replace(record, dtype=DTYPES.get(dtype, record.dtype))
            for name, record in source.tensors.items()
            if record.kind == WEIGHTS
        }
        self.progress: dict[str, Any] = dict(_NO_PROGRESS)
        self.about = {key: value for key, value in source.about.items() if key not in _OF_STATE}

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        there = self._source.tensors[box.name].dtype
        if there == box.dtype:
            self._source.read(box, target)
            return
        numbers = torch.empty(target.shape, dtype=getattr(torch, there))
        self._source.read(replace(box, dtype=there), numbers)
        target.copy_(numbers)

    @contextmanager
    def stream(self, name: str, first: int, last: int) -> Iterator[RowStream]:
        """See `Source`."""
        with self._source.stream(name, first, last) as rows:
            there = self._source.tensors[name].dtype
            yield rows if there == self.tensors[name].dtype else _CastRows(rows, getattr(torch, there))

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        return self._source.cuts(name)

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """See `Source`."""
        if self._source.tensors[name].dtype == self.tensors[name].dtype:
            return self._source.memory_bytes(name, at_cuts=at_cuts)
        return self._source.memory_bytes(name) + _CAST_BYTES

    def megatron(self) -> MegatronState | None:
        """See `Source`."""
        return self._source.megatron()


class _CastRows:
    def __init__(self, rows: RowStream, dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype

    def read(self, target: Tensor) -> None:
        row_bytes = max(1, target[:1].numel() * self._dtype.itemsize)
        for part in target.split(max(1, _CAST_BYTES // row_bytes)):
            numbers = torch.empty(part.shape, dtype=self._dtype)
            self._rows.read(numbers)
            part.copy_(numbers)


def _in_precision(run: RunConfig, dtype: str) -> RunConfig:
    """The run in another precision, its tables too; settings that the old one asked for go back to their defaults."""
    train = replace(run.train, dtype=dtype)

    def settle(memory: Any) -> Any:
        return replace(memory, dtype="", rounding="master", moments_dtype="float32", score_dtype="float32")

    return replace(
        run,
        train=train,
        memory=settle(run.memory),
        more_memories=tuple(settle(memory) for memory in run.more_memories),
        parallel=replace(run.parallel, distributed_optimizer=run.parallel.distributed_optimizer and dtype != "float64"),
    )
