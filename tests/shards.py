"""Small shards and slices of tables, for the tests of memory/ on one process."""

import torch
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.dispatch import choose_backend, interpreted
from mempar.memory.initial import table_values
from mempar.memory.values import ValueShard

# Where kernels are interpreted, they are what is tested.
TESTED = choose_backend("triton" if interpreted() else "auto", "cpu")


def slice_of(num_slots: int, value_dim: int, rows: tuple[int, int], columns: tuple[int, int]) -> TableSlice:
    return TableSlice(
        num_slots=num_slots,
        value_dim=value_dim,
        row_start=rows[0],
        row_end=rows[1],
        column_start=columns[0],
        column_end=columns[1],
    )


def values_of(part: TableSlice, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return table_values(part, seed=seed, dtype=dtype, device=torch.device("cpu"))


def whole_shard(num_slots: int, value_dim: int, dtype: torch.dtype = torch.float64) -> ValueShard:
    part = slice_of(num_slots, value_dim, (0, num_slots), (0, value_dim))
    return ValueShard(part, seed=3, dtype=dtype, device=torch.device("cpu"), backend=TESTED)


def touched_rows(num_rows: int, num_touched: int) -> Tensor:
    return torch.randperm(num_rows)[:num_touched].sort()[0].int()


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def whole_part(values: Tensor) -> TableSlice:
    """The slice that is the whole table."""
    return slice_of(len(values), values.shape[1], (0, len(values)), (0, values.shape[1]))
