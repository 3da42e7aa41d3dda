"""Memory layers added to a model that has none: any source, with fresh tensors among its own.

What is added has the values that the engine would draw for it. In place of a feed-forward network a layer takes over
its block, whose network is dropped. Beside one it starts with saying nothing, so that the first logits are those of the
model: the output projection of `memory_plus` is zero, and so are the rows that `memory` and `peer` add, which have no
projection. Gradients reach what is zero from the first step on, and the rest from the second.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.memory.initial import table_values
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import WEIGHTS, TensorRecord, checksum
from mempar.runtime.config import RunConfig
from mempar.runtime.initial import initial_value
from mempar.runtime.overrides import override
from mempar.tools.convert.hf.tensor_names import memory_shapes, table_shapes
from mempar.tools.convert.row_stream import box_rows
from mempar.tools.convert.selection import DTYPES
from mempar.tools.convert.source import RowStream, Source

_SECTION = "memory."
# Rows of a table are drawn in float64, some two million numbers at a time, from as many hashes.
_DRAWING_BYTES = 1 << 27
# For each number of a table that is smaller than that: some eight temporaries of eight bytes.
_ELEMENT_BYTES = 64
_NETWORK = (".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight")


class WithMemory:
    """See `Source`: another source with memory layers; weights alone, for what is added has no optimizer state."""

    has_digests = False

    def __init__(self, source: Source, assignments: Sequence[str]) -> None:
        """Say what is added.

        Args:
            source: a model without memory layers.
            assignments: `memory.KEY=VALUE`, as on the command line of `train`.

        Raises:
            ConfigError: for other assignments, a model that has memory layers, or layers that do not fit it.
        """
        self.run = _run_with_memory(source, assignments)
        self.source = source
        self.root, self.progress, self.about = source.root, source.progress, source.about
        self.identity = checksum(f"{source.identity} {self.run}".encode())
        weights = {name: record for name, record in source.tensors.items() if record.kind == WEIGHTS}
        dense_dtype = weights["decoder.final_layernorm.weight"].dtype
        dropped, added = _changes(source, self.run)
        self._tables = table_shapes(self.run)
        self._added = {name: _record(dense_dtype, shape) for name, shape in added.items()}
        table_dtype = DTYPES[self.run.table_dtype_of(self.run.memory)]
        self._added |= {name: _record(table_dtype, shape) for name, shape in self._tables.items()}
        kept = {name: replace(record, digest=0) for name, record in weights.items() if name not in dropped}
        self.tensors: Mapping[str, TensorRecord] = kept | self._added

    def read(self, box: Box, target: Tensor) -> None:
        """See `Source`."""
        if box.name not in self._added:
            self.source.read(box, target)
        elif box.name in self._tables:
            self._draw_rows(box, target)
        else:
            inside = tuple(slice(at, at + size) for at, size in zip(box.offset, box.sizes, strict=True))
            target.copy_(self._draw(box.name, box.shape)[inside])

    def stream(self, name: str, first: int, last: int) -> AbstractContextManager[RowStream]:
        """See `Source`."""
        if name in self._added:
            return box_rows(self, name, first)
        return self.source.stream(name, first, last)

    def cuts(self, name: str) -> list[int]:
        """See `Source`."""
        # What is made here is made row by row.
        return [0, self.tensors[name].shape[0]] if name in self._added else self.source.cuts(name)

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        """See `Source`."""
        if name not in self._added:
            return self.source.memory_bytes(name, at_cuts=at_cuts)
        if name in self._tables:
            return min(_DRAWING_BYTES, _ELEMENT_BYTES * math.prod(self.tensors[name].shape))
        # It is drawn whole, in float64.
        return 8 * math.prod(self.tensors[name].shape)

    def megatron(self) -> None:
        """See `Source`; what megatron left is of another model."""

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.run.memory.beside and ".output_proj." in name:
            return torch.zeros(shape)
        model = self.run.model
        return initial_value(
            name, shape, seed=self.run.train.seed, init_std=model.init_std, num_layers=model.num_layers
        )

    def _draw_rows(self, box: Box, target: Tensor) -> None:
        memory = self.run.memory
        if memory.beside and memory.variant != "memory_plus" and box.name.endswith(".values"):
            target.zero_()
            return
        part = TableSlice(
            num_slots=box.shape[0],
            value_dim=box.shape[1],
            row_start=box.offset[0],
            row_end=box.offset[0] + box.sizes[0],
            column_start=box.offset[1],
            column_end=box.offset[1] + box.sizes[1],
        )
        number = list(self._tables).index(box.name)
        target.copy_(
            table_values(part, seed=self.run.train.seed, number=number, dtype=target.dtype, device=torch.device("cpu"))
        )


def _run_with_memory(source: Source, assignments: Sequence[str]) -> RunConfig:
    if source.run.memories:
        raise ConfigError(
            f"{source.root} has memory layers in blocks {list(source.run.memory_layers)}, and {' '.join(assignments)} "
            "would add others; they are added to models without any; leave these settings out."
        )
    for assignment in assignments:
        if not assignment.startswith(_SECTION):
            raise ConfigError(
                f"'{assignment}' is no setting of a memory; only {_SECTION}KEY=VALUE adds memory layers; leave it out."
            )
    # Of a memory that is not enabled no setting counts.
    fresh = replace(source.run, memory=MemoryConfig(enabled=False))
    run = override(fresh, ["memory.enabled=true", *assignments])
    if not run.memories:
        raise ConfigError(
            f"{' '.join(assignments)} would add no memory layer: with memory.enabled=false there is none; leave all of "
            "it out."
        )
    return run


def _changes(source: Source, run: RunConfig) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Names of tensors that are dropped, and shapes of those that are added to blocks, by name."""
    dropped: set[str] = set()
    added: dict[str, tuple[int, ...]] = {}
    memory = run.memory
    for block in memory.layers:
        place = f"decoder.layers.{block}"
        network = {place + name for name in _NETWORK}
        if not network <= source.tensors.keys():
            raise ConfigError(
                f"block {block} of {source.root} has no feed-forward network, but experts; a memory layer stands "
                "beside one or in its place; name other blocks in memory.layers."
            )
        if not memory.beside:
            dropped |= network
        prefix = f"{place}.mlp.memory." if memory.beside else f"{place}.mlp."
        added |= {prefix + name: shape for name, shape in memory_shapes(run, memory).items()}
    return dropped, added


def _record(dtype: str, shape: tuple[int, ...]) -> TensorRecord:
    return TensorRecord(dtype=dtype, shape=shape, kind=WEIGHTS, digest=0)
