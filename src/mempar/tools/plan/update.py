"""How long a rank computes after the last micro-batch: sums of deposits by row, the rows' update, the dense optimizer.

`touched` rows of a shard are those of even and independent reads, as in the estimate of their memory. Passes over the
summed gradients are counted in runtime/optim.py: divided by the tokens, squared in float64 in blocks, clipped, applied.
"""

import math
from dataclasses import dataclass

from mempar.memory.config import MemoryConfig
from mempar.memory.footprint import Deposits, record_bytes, state_bytes
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.dense import DenseBytes
from mempar.runtime.estimate.layout import DTYPE_BYTES, Layout
from mempar.runtime.estimate.tables import deposits_of_lookup, touched_rows
from mempar.runtime.hardware import Hardware
from mempar.tools.plan.roofline import Roofline

# Bytes of an entry while entries are sorted by row: four passes over 8 bytes, read and written.
_SORT_BYTES = 64
# Bytes of a summed number beside its own update: divided (8), squared in float64 (read 4, copied 8, squared 8 + 8,
# summed 8), clipped (8).
_NORM_BYTES = 52


@dataclass(frozen=True, kw_only=True)
class TableStep:
    """What a step does to one shard of a memory's tables.

    Attributes:
        deposits: of all lookups of the step.
        early_sums: how often records are summed before the last micro-batch (`memory.deposit_bytes`).
        num_columns: D_j.
        copies: ranks that hold the same shard.
        copied_rows: distinct rows that any of them touched.
    """

    deposits: Deposits
    early_sums: int
    num_columns: int
    copies: int
    copied_rows: int


def table_step(layout: Layout, name: str, stage: int) -> TableStep:
    """What a step does to the largest shard of a memory's tables on a pipeline stage."""
    memory, placed = layout.run.memories[name], layout.placement.memories[name]
    part, value_bytes = placed.plan.part_of(0), layout.run.value_bytes_of(memory)
    own = sum(block in memory.layers for chunk in layout.chunks_of(stage) for block in chunk.blocks)
    lookup, times = deposits_of_lookup(layout, memory, placed.plan, part), own * layout.batch.num_micro_batches
    step = Deposits(
        entries=lookup.entries * times,
        tokens=lookup.tokens * times,
        rows=touched_rows(part.num_rows, lookup.entries * times),
    )
    whole = record_bytes(step, part.num_columns, value_bytes)
    early = math.ceil(whole / memory.deposit_bytes) - 1 if 0 < memory.deposit_bytes < whole else 0
    copies = layout.grid.stage_size // layout.grid.mp * len(placed.stages)
    return TableStep(
        deposits=step,
        early_sums=early,
        num_columns=part.num_columns,
        copies=copies,
        copied_rows=touched_rows(part.num_rows, step.entries * copies),
    )


def update_compute_us(
    run: RunConfig, layout: Layout, stage: int, dense: DenseBytes, hardware: Hardware, *, with_tables: bool = True
) -> dict[str, float]:
    """Times of what a rank of a stage does after the last micro-batch, without communication.

    Args:
        run: the run, as `layout.run`.
        layout: where it is laid out.
        stage: the pipeline stage.
        dense: bytes of the dense parameters and their optimizer, `dense_bytes(layout, stage)`.
        hardware: the device.
        with_tables: whether tables are looked at.

    Returns:
        Microseconds of `reduce_rows` (the early sums of the whole step included) and `row_update` where the stage
        holds tables, and of `dense_update`.
    """
    roof = Roofline(hardware, DTYPE_BYTES[run.train.dtype])
    found: dict[str, float] = {}
    for name, placed in layout.placement.memories.items():
        if stage not in placed.stages or not with_tables:
            continue
        memory, step = run.memories[name], table_step(layout, name, stage)
        tables = len(memory.table_names)
        reduce_us = tables * _reduce_rows(roof, step, run.value_bytes_of(memory))
        update_us = tables * _row_update(roof, memory, placed.plan, step, run.value_bytes_of(memory))
        found["reduce_rows"] = found.get("reduce_rows", 0.0) + reduce_us
        found["row_update"] = found.get("row_update", 0.0) + update_us
    # The state read and written, gradients in float32 with their norm, and new weights; of this rank's share.
    state_per_weight = (4 if layout.value_bytes < 4 else 0) + 2 * layout.wide_bytes
    updated = dense.state / state_per_weight
    num_bytes = 2 * dense.state + updated * (layout.wide_bytes + _NORM_BYTES) + dense.weights
    found["dense_update"] = roof.bytes(num_bytes, 20)
    return found


def _reduce_rows(roof: Roofline, step: TableStep, value_bytes: int) -> float:
    """Entries sorted by row, an output gradient read for each, sums written; early sums read and written each time."""
    wide = max(4, value_bytes)
    sums = step.deposits.rows * step.num_columns * wide
    own = roof.bytes(step.deposits.entries * _SORT_BYTES, 8)
    own += roof.rows(step.deposits.entries, step.num_columns * value_bytes)
    own += roof.bytes(sums * (1 + 2 * step.early_sums), 1 + 4 * step.early_sums)
    if step.copies == 1:
        return own
    # The sums of all holders, read by row, and their sum.
    return own + roof.bytes((step.deposits.rows * step.copies + step.copied_rows) * step.num_columns * wide, 8)


def _row_update(roof: Roofline, memory: MemoryConfig, plan: ShardPlan, step: TableStep, value_bytes: int) -> float:
    """Sums, values and state of the touched rows; of all rows under the exact `adamw`."""
    part, wide = plan.part_of(0), max(4, value_bytes)
    rows = part.num_rows if memory.optimizer == "adamw" else step.copied_rows
    state = state_bytes(memory, part, value_bytes) / (part.num_rows * part.num_columns)
    norms = step.copied_rows * step.num_columns * _NORM_BYTES
    return roof.bytes(rows * step.num_columns * (wide + 2 * value_bytes + 2 * state) + norms, 12)
