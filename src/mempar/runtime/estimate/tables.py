"""Bytes of a rank's shards of the tables: values, state, records of a step and what sums and updates them.

Numbers of rows touched are those of reads that fall evenly and independently, `S_i (1 - (1 - 1/S_i)^E)` of a shard's
S_i rows under E entries: no other way of reading touches more rows on average. memory/footprint.py has the formulas.
"""

import math
from dataclasses import dataclass, replace

from mempar.dims import TableSlice
from mempar.memory.config import MemoryConfig
from mempar.memory.footprint import (
    Deposits,
    record_bytes,
    state_bytes,
    summing_bytes,
    sums_bytes,
    updating_bytes,
    values_bytes,
)
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.estimate.layout import Layout

# An int32 a row: the step in which it was read last.
_HISTORY_BYTES = 4
# Elements of a gradient that are squared at a time; see runtime/optim.py.
_NORM_ELEMENTS = 1 << 24
# Row, bag and a float32 weight of a row that was summed early.
_SUMMED_ENTRY_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class TableBytes:
    """Bytes on one rank.

    Attributes:
        values: of the shards.
        state: of their optimizers, and when each row was read last.
        records: at the end of the last backward pass.
        row_sums: beside the records, when these are summed by row, summed over copies and applied.
        early_sums: beside the records, while the backward passes last: sums made to bound the records.
    """

    values: int = 0
    state: int = 0
    records: int = 0
    row_sums: int = 0
    early_sums: int = 0


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What a step asks of one shard."""

    memory: MemoryConfig
    part: TableSlice
    value_bytes: int
    # Of one lookup, and of all of a step.
    lookup: Deposits
    step: Deposits
    # Holders of the same shard.
    copies: int

    @property
    def all_records(self) -> int:
        return record_bytes(self.step, self.part.num_columns, self.value_bytes)

    @property
    def sums_early(self) -> bool:
        return 0 < self.memory.deposit_bytes < self.all_records

    @property
    def records(self) -> int:
        if not self.sums_early:
            return self.all_records
        # The lookup that goes beyond the limit is still kept whole.
        last = record_bytes(self.lookup, self.part.num_columns, self.value_bytes)
        return self.memory.deposit_bytes + last + self.sums + _SUMMED_ENTRY_BYTES * self.step.rows

    @property
    def at_once(self) -> Deposits:
        """What is summed at a time, at the most."""
        if not self.sums_early:
            return self.step
        share = self.memory.deposit_bytes / self.all_records
        lookup, rows = self.lookup, self.step.rows
        return Deposits(
            entries=math.ceil(self.step.entries * share) + lookup.entries + rows,
            tokens=math.ceil(self.step.tokens * share) + lookup.tokens + rows,
            rows=rows,
        )

    @property
    def sums(self) -> int:
        return sums_bytes(self.step, self.part.num_columns, self.value_bytes)

    @property
    def sums_over_copies(self) -> int:
        """Of the rows that any holder touched."""
        rows = touched_rows(self.part.num_rows, self.step.entries * self.copies)
        return sums_bytes(replace(self.step, rows=rows), self.part.num_columns, self.value_bytes)

    def summing(self, *, fused: bool) -> int:
        return summing_bytes(self.at_once, self.part.num_columns, self.value_bytes, fused=fused)

    def updating(self, *, fused: bool) -> int:
        return updating_bytes(self.memory, self.step, self.part.num_columns, self.value_bytes, fused=fused)


def table_bytes(layout: Layout, stage: int, rank: int | None = None) -> TableBytes:
    """Bytes of a rank of a pipeline stage.

    Args:
        layout: the run.
        stage: the pipeline stage.
        rank: a world rank of it; by default the one with the largest shards, the first.
    """
    member = 0 if rank is None else layout.grid.memory_rank(rank)
    values = state = 0
    shards: list[_Shard] = []
    for name, placed in layout.placement.memories.items():
        if stage not in placed.stages:
            continue
        memory = layout.run.memories[name]
        part, value_bytes = placed.plan.part_of(member), layout.run.value_bytes_of(memory)
        number = len(memory.table_names)
        values += number * values_bytes(part, value_bytes)
        state += number * state_bytes(memory, part, value_bytes)
        state += _HISTORY_BYTES * part.num_rows if memory.usage_interval else 0
        lookup = deposits_of_lookup(layout, memory, placed.plan, part)
        own = sum(block in memory.layers for chunk in layout.chunks_of(stage) for block in chunk.blocks)
        step = _times(lookup, own * layout.batch.num_micro_batches, part.num_rows)
        copies = layout.grid.stage_size // layout.grid.mp * len(placed.stages)
        shard = _Shard(memory=memory, part=part, value_bytes=value_bytes, lookup=lookup, step=step, copies=copies)
        shards += [shard] * number
    records = sum(shard.records for shard in shards)
    fused = layout.is_fused
    return TableBytes(
        values=values,
        state=state,
        records=records,
        row_sums=max(0, _peak_of_update(layout, shards) - records),
        early_sums=max((shard.sums + shard.summing(fused=fused) for shard in shards if shard.sums_early), default=0),
    )


def looked_up(layout: Layout) -> int:
    """Tokens of a micro-batch that a rank looks up: those that it holds, or its share where others hold the same."""
    return -(-layout.tokens // layout.grid.tp)


def deposits_of_lookup(layout: Layout, memory: MemoryConfig, plan: ShardPlan, part: TableSlice) -> Deposits:
    """What the lookups of one layer and micro-batch deposit in a shard, if reads fall evenly on rows."""
    tokens = looked_up(layout) * plan.num_shards
    entries = round(tokens * memory.heads * memory.top_k * part.num_rows / part.num_slots)
    return Deposits(entries=entries, tokens=tokens, rows=touched_rows(part.num_rows, entries))


def touched_rows(num_rows: int, entries: int) -> int:
    """Rows that so many even and independent reads are expected to touch."""
    return math.ceil(-num_rows * math.expm1(entries * math.log1p(-1 / num_rows))) if num_rows > 1 else num_rows


def _times(lookup: Deposits, count: int, num_rows: int) -> Deposits:
    entries = lookup.entries * count
    return Deposits(entries=entries, tokens=lookup.tokens * count, rows=touched_rows(num_rows, entries))


def _peak_of_update(layout: Layout, shards: list[_Shard]) -> int:
    """Most bytes of records, sums and what makes them, after the last backward pass.

    Shard after shard is summed by row and over copies; then their norms are taken and all are updated, so that their
    sums exist together.
    """
    fused = layout.is_fused
    records, sums, peak = sum(shard.records for shard in shards), 0, 0
    for shard in shards:
        peak = max(peak, records + sums + shard.sums + shard.summing(fused=fused))
        records -= shard.records
        # Own sums, once more for each holder to send, and those of all of them.
        gathered = shard.sums * (1 + 2 * shard.copies) if shard.copies > 1 else 0
        peak = max(peak, records + sums + gathered)
        sums += shard.sums_over_copies
    updating = max((shard.updating(fused=fused) for shard in shards), default=0)
    # A block of a gradient in float64, and its squares.
    squares = max((min(_NORM_ELEMENTS, shard.sums_over_copies // layout.wide_bytes) for shard in shards), default=0)
    return max(peak, sums + max(updating, 2 * 8 * squares))
