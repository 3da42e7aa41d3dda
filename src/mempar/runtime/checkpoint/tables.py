"""Tables, their optimizers' state and the histories of their rows as parts of logical tensors `[S, D]` and `[S]`."""

from collections.abc import Iterator

from torch import Tensor

from mempar.dims import TableSlice
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.manifest import HISTORY, OPTIMIZER, WEIGHTS
from mempar.runtime.checkpoint.shard_file import dtype_name
from mempar.runtime.optim import Optimizers
from mempar.runtime.tables import Table


def table_parts(
    tables: list[Table], optimizers: Optimizers, with_history: list[str]
) -> Iterator[tuple[Table, str, Box, Tensor]]:
    """This rank's shards of everything that belongs to tables.

    Args:
        tables: of this rank.
        optimizers: their state.
        with_history: memories whose rows' history is wanted too.

    Yields:
        The table, the kind of the tensor, the shard's place, its numbers.
    """
    for table in tables:
        owner = optimizers.tables[table.name]
        yield table, WEIGHTS, _table_box(table.name, table.shard.values, table.shard.part), table.shard.values
        for name, tensor in owner.state.items():
            yield table, OPTIMIZER, _table_box(f"{table.name}.{name}", tensor, owner.place_of(name)), tensor
    first_tables = {table.memory: table for table in reversed(tables)}
    for memory, table in first_tables.items():
        if memory in with_history:
            last_read = optimizers.histories[memory].last_read
            yield table, HISTORY, _history_box(memory, last_read, table.shard.part), last_read


def _table_box(name: str, tensor: Tensor, part: TableSlice) -> Box:
    return Box(
        name=name,
        dtype=dtype_name(tensor.dtype),
        shape=(part.num_slots, part.value_dim),
        offset=(part.row_start, part.column_start),
        sizes=(part.num_rows, part.num_columns),
    )


def _history_box(memory: str, last_read: Tensor, part: TableSlice) -> Box:
    return Box(
        name=f"{memory}.last_read",
        dtype=dtype_name(last_read.dtype),
        shape=(part.num_slots,),
        offset=(part.row_start,),
        sizes=(part.num_rows,),
    )
