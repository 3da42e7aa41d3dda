"""The row-cost law: what a step allocates, computes and sends does not depend on the number of slots.

Allocations are seen by a dispatch mode that looks at the storage behind every operator's outputs; that
it sees dense temporaries is shown by controls that make one.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mempar.memory.footprint import state_bytes, values_bytes
from mempar.memory.optimizer import TableOptimizer
from mempar.memory.values import ValueShard
from mempar.runtime.bringup import tear_down
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import place
from mempar.runtime.slot_trace import SlotTrace
from rank_pool import RankPool
from toy import Seen, Session, joined, toy_run, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "columns": (2, {"mp": 2, "mp_rows": 1}),
    "rows": (2, {"mp": 2, "mp_rows": 2}),
    "grid": (4, {"mp": 4, "mp_rows": 2}),
    "replicas": (4, {"mp": 2, "mp_rows": 2}),
    "stage-copies": (2, {"pp": 2}),
    "tp-columns": (2, {"tp": 2, "mp": 2, "mp_rows": 1}),
    "sp-rows": (2, {"tp": 2, "sequence_parallel": True, "mp": 2, "mp_rows": 2}),
}


class AllocationWatch(TorchDispatchMode):
    """Looks at the storage of every output; results in place and views of inputs are not new.

    Attributes:
        largest: most elements of any new storage, and the operator that made it.
        elements: sum of the elements of all new outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[int, str] = (0, "")
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = func(*args, **kwargs)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in known:
                self.elements += output.numel()
                elements = output.untyped_storage().nbytes() // output.element_size()
                self.largest = max(self.largest, (elements, str(func)))
        return outputs


def large_table(num_subkeys: int, **settings: Any) -> RunConfig:
    """A table with many times more rows than a step reads."""
    run = toy_run(micro_batches=4, **settings)
    # A micro-batch has one sequence of 8 tokens: 4 x 8 x 2 x 4 = 256 reads a layer and step.
    return replace(
        run,
        memory=replace(run.memory, num_subkeys=num_subkeys),
        train=replace(run.train, seq_length=8, micro_batch_size=1, global_batch_size=4),
    )


@dataclass
class Watched:
    """What one rank allocated.

    Attributes:
        shard_elements: elements of the shard of the table; 0 without one.
        building: largest allocation while everything was built.
        training: largest allocation of a step.
        table_bytes: of the shard.
        state_bytes: of its moments (and float32 values beside bf16 ones).
    """

    shard_elements: int
    building: tuple[int, str]
    training: tuple[int, str]
    table_bytes: int = 0
    state_bytes: int = 0


def watch(run: RunConfig, steps: int, control: bool = False) -> Watched:
    """Build a run and train on this rank; `control` makes a dense gradient on the way."""
    with AllocationWatch() as building:
        session = Session(run)
    take = ValueShard.take_gradient

    def take_densely(shard: ValueShard) -> tuple[Tensor, Tensor]:
        rows, grads = take(shard)
        dense = torch.zeros(shard.values.shape, dtype=grads.dtype)
        dense[rows.long()] = grads
        return rows, dense[rows.long()]

    training = AllocationWatch()
    with patch.object(ValueShard, "take_gradient", take_densely if control else take), training:
        for step in range(steps):
            session.step(step)
    tear_down(session.world)
    if not session.model.tables:
        return Watched(0, building.largest, training.largest)
    (table,) = session.model.tables
    values, states = table.shard.values, session.optimizers.tables[table.name].state.values()
    state_bytes = sum(state.untyped_storage().nbytes() for state in states)
    table_bytes = values.untyped_storage().nbytes()
    return Watched(values.numel(), building.largest, training.largest, table_bytes, state_bytes)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        *((layout, {}) for layout in LAYOUTS),
        ("single", {"dtype": "bf16"}),
        ("grid", {"dtype": "bf16"}),
        ("single", {"memory": {"dtype": "bf16", "rounding": "stochastic", "moments_dtype": "bf16"}}),
        ("grid", {"optimizer": "row_adagrad", "memory": {"dtype": "bf16", "rounding": "nearest"}}),
        ("columns", {"optimizer": "row_adagrad"}),
    ],
    ids=str,
)
def test_ranks_allocate_their_share_and_no_more(layout: str, settings: dict[str, Any], pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    run = large_table(128, **settings, **sizes)
    placement = place(run, world_size)
    plan = placement.memories["memory"].plan
    value_bytes = run.value_bytes_of(run.memory)
    whole = plan.num_slots * plan.value_dim
    seen = pool.run(world_size, watch, run, 2)
    # Parts of equal size: 128 x 128 slots and 24 columns divide by 4.
    part = plan.part_of(0)
    # Two moments of 4 bytes, or of 2; one number for a tile of 4 columns; the float32 values of narrower ones.
    expected = {"row_adam": 8, "row_adagrad": 1}[run.memory.optimizer]
    expected = 4 if run.memory.moments_dtype == "bf16" else expected
    expected += 4 if run.table_dtype_of(run.memory) == "bf16" and run.memory.rounding == "master" else 0
    for rank in seen:
        if rank.shard_elements:
            assert rank.shard_elements == whole // plan.num_shards
            assert rank.table_bytes == value_bytes * rank.shard_elements == values_bytes(part, value_bytes)
            assert rank.state_bytes == expected * rank.shard_elements
            assert rank.state_bytes == state_bytes(run.memory, part, value_bytes)
            assert rank.building[0] <= rank.shard_elements, rank.building
            assert rank.training[0] < rank.shard_elements // 2, rank.training
    copies = len(placement.grid.memory_groups(placement.table_stages))
    assert sum(rank.shard_elements for rank in seen) == copies * whole


@pytest.mark.parametrize(("layout", "optimizer"), [("single", "row_adam"), ("rows", "row_adam"), ("rows", "adamw")])
def test_dense_temporaries_are_seen(layout: str, optimizer: str, pool: RankPool) -> None:
    # The exact optimizer updates all rows, in blocks larger than this table: it needs no control.
    world_size, sizes = LAYOUTS[layout]
    run = large_table(128, optimizer=optimizer, **sizes)
    for rank in pool.run(world_size, watch, run, 1, optimizer == "row_adam"):
        assert rank.training[0] >= rank.shard_elements > 0


def count_step(run: RunConfig, replay: SlotTrace | None) -> Seen:
    """Train one step; note bytes by phase, rows updated, and elements made by each operation on rows."""
    elements: Counter[str] = Counter()
    rows: list[int] = []

    def counted(owner: type, name: str) -> Any:
        original = getattr(owner, name)

        def method(self: Any, *args: Any) -> Any:
            with AllocationWatch() as seen:
                result = original(self, *args)
            elements[name] += seen.elements
            if name == "update":
                rows.append(len(args[0]))
            return result

        return patch.object(owner, name, method)

    ledgers: list[Any] = []

    def observe(session: Session, seen: Seen) -> None:
        assert session.world.groups is not None
        session.world.groups.ledger.clear()
        ledgers.append(session.world.groups.ledger)

    with (
        counted(ValueShard, "gather"),
        counted(ValueShard, "backward"),
        counted(ValueShard, "take_gradient"),
        counted(TableOptimizer, "update"),
    ):
        seen = train(run, 1, replay, ("slots",), observe)
    seen.extra = {"bytes": dict(ledgers[0].sent_bytes), "rows": rows, "elements": dict(elements)}
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_costs_the_same_when_slots_grow_16_times(layout: str, pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    small, large = large_table(32, **sizes), large_table(128, **sizes)
    assert large.memory.num_slots == 16 * small.memory.num_slots
    chosen = joined(small, pool.run(world_size, count_step, small, None))
    spread = SlotTrace()
    # The same reads from a table with 16 times the rows: slot 16 s lies in the row shard in which s lay.
    spread.slots = {key: 16 * slots for key, slots in chosen.trace.slots.items()}
    grown = joined(large, pool.run(world_size, count_step, large, spread))
    for before, after in zip(chosen.seen, grown.seen, strict=True):
        assert before.extra == after.extra
        assert sum(before.extra["elements"].values()) > 0
        assert sum(before.extra["rows"]) > 0
