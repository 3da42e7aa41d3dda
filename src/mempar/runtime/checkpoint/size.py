"""Bytes of a checkpoint, from a run's configuration alone: what a disk must hold and a network carry.

Weights, the optimizers' state and the histories of rows, as logical tensors: it does not depend on the layout, but
for the distributed optimizer, which saves a float32 copy of every dense parameter.
"""

from dataclasses import dataclass

from mempar.dims import TableSlice
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import RunConfig
from mempar.runtime.size import model_size

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bf16": 2}
# Step of the last read, a row.
_HISTORY_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CheckpointSize:
    """Bytes of one checkpoint by what they are of.

    Attributes:
        dense: parameters and their optimizer's state.
        tables: values and their optimizers' state.
        histories: of the tables' rows.
    """

    dense: int
    tables: int
    histories: int

    @property
    def total(self) -> int:
        """All of it, without headers and manifest."""
        return self.dense + self.tables + self.histories


def checkpoint_size(run: RunConfig, vocab_size: int) -> CheckpointSize:
    """Bytes of one checkpoint of a run.

    Args:
        run: its configuration.
        vocab_size: of its tokenizer.
    """
    size = model_size(run, vocab_size)
    memories = run.memories.values()
    return CheckpointSize(
        dense=(size.total_params - size.memory_params) * dense_bytes_per_parameter(run),
        tables=sum(_table_bytes(run, memory) for memory in memories),
        histories=sum(_HISTORY_BYTES * memory.num_slots for memory in memories if memory.usage_interval),
    )


def dense_bytes_per_parameter(run: RunConfig) -> int:
    """A dense parameter, its copy that is stepped where there is one, and two moments."""
    own = _DTYPE_BYTES[run.train.dtype]
    state = max(4, own)
    copies = run.train.dtype == "bf16" or run.parallel.distributed_optimizer
    return own + (state if copies else 0) + 2 * state


def _table_bytes(run: RunConfig, memory: MemoryConfig) -> int:
    # Reaches torch, which the rest here does not.
    from mempar.memory.footprint import state_bytes, values_bytes

    value_dim, value_bytes = run.value_dim_of(memory), run.value_bytes_of(memory)
    whole = TableSlice(
        row_start=0,
        row_end=memory.num_slots,
        column_start=0,
        column_end=value_dim,
        num_slots=memory.num_slots,
        value_dim=value_dim,
    )
    one = values_bytes(whole, value_bytes) + state_bytes(memory, whole, value_bytes)
    return len(memory.table_names) * one
