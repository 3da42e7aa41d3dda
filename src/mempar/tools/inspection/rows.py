"""Norms of a table's rows, and which rows hold their initial values still.

The initial value of every number is a function of the seed, the slot and the column (`memory/initial.py`), so a row
that no step has changed can be told from one that was. A few columns tell most rows; the others are compared whole.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from mempar.memory.initial import row_values
from mempar.runtime.config import RunConfig
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.inspection.findings import RowFindings
from mempar.tools.inspection.row_blocks import row_blocks

# Of a bin of norms, its upper over its lower bound is 2 to the power of one over this.
BINS_AN_OCTAVE = 32
_FIRST_COLUMNS = 16
# Numbers that are widened or drawn at a time.
_CHUNK_ELEMENTS = 1 << 22


def table_numbers(run: RunConfig) -> dict[str, int]:
    """The tables of a run by name, with their places among all tables, from which their initial values come."""
    names = [f"{name}.{part}" for name, memory in run.memories.items() for part in memory.table_names]
    return {name: number for number, name in enumerate(names)}


def read_rows(source: CheckpointSource, table: str, advance: Callable[[int], None], limit: int = 0) -> RowFindings:
    """Look at the rows of a table, block after block.

    Args:
        source: the checkpoint.
        table: its name.
        advance: is told how many more rows were looked at.
        limit: rows to look at, evenly over the table; 0 for all.

    Raises:
        CheckpointError: when a piece is damaged.
    """
    counter = _Counter(source.run.train.seed, table_numbers(source.run)[table])
    for first, values in row_blocks(source, table, advance, limit):
        at_once = max(1, _CHUNK_ELEMENTS // values.shape[1])
        for start in range(0, len(values), at_once):
            counter.add(first + start, values[start : start + at_once])
    return counter.findings(table, source.tensors[table].shape[0])


class _Counter:
    """Counts rows by their norms."""

    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number
        self.rows = self.zero_rows = self.not_finite_rows = 0
        self.all_rows: Counter[int] = Counter()
        self.initial_rows: Counter[int] = Counter()
        self.num_initial = 0
        self.smallest, self.largest, self.total = math.inf, 0.0, 0.0

    def add(self, first: int, values: Tensor) -> None:
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
        initial = _hold_initial_values(values, first, self.seed, self.number)
        counted = norms.isfinite() & (norms > 0)
        self.rows += len(values)
        self.num_initial += int(initial.sum())
        self.zero_rows += int((norms == 0).sum())
        self.not_finite_rows += int((~norms.isfinite()).sum())
        self.all_rows.update(_by_bins(norms[counted]))
        self.initial_rows.update(_by_bins(norms[counted & initial]))
        if counted.any():
            found = norms[counted]
            self.smallest, self.largest = min(self.smallest, float(found.min())), max(self.largest, float(found.max()))
            self.total += float(found.sum())

    def findings(self, table: str, num_rows: int) -> RowFindings:
        counted = self.all_rows.total()
        return RowFindings(
            table=table,
            num_rows=num_rows,
            rows=self.rows,
            initial_rows=self.num_initial,
            zero_rows=self.zero_rows,
            not_finite_rows=self.not_finite_rows,
            smallest=self.smallest if counted else 0.0,
            mean=self.total / counted if counted else 0.0,
            largest=self.largest,
            norms=[
                [2 ** (place / BINS_AN_OCTAVE), 2 ** ((place + 1) / BINS_AN_OCTAVE), number, self.initial_rows[place]]
                for place, number in sorted(self.all_rows.items())
            ],
        )


def _by_bins(norms: Tensor) -> dict[int, int]:
    places, numbers = torch.unique((norms.log2() * BINS_AN_OCTAVE).floor().long(), return_counts=True)
    return dict(zip(places.tolist(), numbers.tolist(), strict=True))


def _hold_initial_values(values: Tensor, first: int, seed: int, number: int) -> Tensor:
    """Which rows of `[rows, D]`, of slots from `first` on, hold what they were drawn as: `[rows] bool`."""
    slots = torch.arange(first, first + len(values))

    def drawn(rows: Tensor, start: int, end: int) -> Tensor:
        return row_values(
            slots[rows],
            torch.arange(start, end),
            value_dim=values.shape[1],
            seed=seed,
            number=number,
            dtype=values.dtype,
        )

    rows = torch.arange(len(values))
    # Rows that were changed are changed everywhere, but for rounding.
    for start, end in ((0, _FIRST_COLUMNS), (_FIRST_COLUMNS, values.shape[1])):
        end = min(end, values.shape[1])
        if start < end and len(rows):
            rows = rows[(values[rows, start:end] == drawn(rows, start, end)).all(1)]
    initial = torch.zeros(len(values), dtype=torch.bool)
    initial[rows] = True
    return initial
