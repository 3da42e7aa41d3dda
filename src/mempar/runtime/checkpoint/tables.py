"""Tables, their optimizers' state and the histories of their rows as parts of logical tensors `[S, D]` and `[S]`."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from mempar.dims import TableSlice, even_cuts
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


def saved_share(table: Table, kind: str, box: Box, tensor: Tensor, block_rows: int) -> tuple[Box, Tensor] | None:
    """The rows of a shard that this rank saves: ranks that hold copies of it share the row blocks evenly.

    Column shards hold the same history, so that the first of them saves it.
    """
    if kind == HISTORY and table.shard.part.column_start > 0:
        return None
    start, end = box.offset[0], box.offset[0] + box.sizes[0]
    first_block, last_block = start // block_rows, -(-end // block_rows)
    cuts = even_cuts(last_block - first_block, table.copies.size)
    mine = [(first_block + cuts[table.copies.rank + more]) * block_rows for more in (0, 1)]
    first, stop = max(start, mine[0]), min(end, mine[1])
    if first >= stop or not box.num_elements:
        return None
    share = replace(box, offset=(first, *box.offset[1:]), sizes=(stop - first, *box.sizes[1:]))
    return share, tensor[first - start : stop - start]


def block_rows_of(table: Table, block_bytes: int) -> int:
    """Rows of a block: as many whole rows of the table's values as fill it. All its state is cut at the same rows."""
    row_bytes = table.shard.part.value_dim * table.shard.values.element_size()
    return max(1, block_bytes // row_bytes)


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
