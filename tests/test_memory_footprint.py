"""Peak memory of a rank: values, optimizer state, records and their sums, and no other term in S.

The allocator's own events are summed from the building of everything on, and the peak of a step is taken
(initial values are made in blocks of bounded size, larger than this table). What a communication thread frees is in
no event, so messages are kept until such threads have let go of them. The formula is that of memory/footprint.py in
actual counts. The dense model is small: its parameters, gradients and moments are
counted, its activations are not and stay within the tolerance.
"""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mempar.memory.footprint import Deposits, peak_bytes, record_bytes, state_bytes, values_bytes
from mempar.parallel import collectives
from mempar.runtime.bringup import tear_down
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import place
from mempar.runtime.slot_trace import SlotTrace
from rank_pool import RankPool
from toy import Seen, Session, joined, toy_run

LET_GO_SECONDS = 30.0
# Every rank has the same number of micro-batches, 24 in all.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "columns": (2, {"mp": 2, "mp_rows": 1}),
    "rows": (2, {"mp": 2, "mp_rows": 2}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "row_adam": {},
    "row_adagrad": {"optimizer": "row_adagrad"},
    "bf16": {"memory": {"dtype": "bf16", "rounding": "stochastic", "moments_dtype": "bf16"}},
}


def wide_run(num_subkeys: int, *, memory: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """Rows much wider than the model, so that the table and its records are what takes memory."""
    run = toy_run(
        memory={"layers": (1,), "num_subkeys": num_subkeys, "value_dim": 512, "column_tile": 64, **(memory or {})},
        micro_batches=24,
        **settings,
    )
    return replace(
        run,
        model=replace(run.model, num_layers=2),
        train=replace(run.train, seq_length=64, micro_batch_size=1, global_batch_size=24),
    )


def holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def all_to_all_and_let_go(received: Tensor, send: Tensor, *args: Any, **kwargs: Any) -> None:
    """Exchange, and return when the communication thread holds neither tensor any more."""
    before = holders(received), holders(send)
    # Of tensors of its own, whose storages the thread then keeps.
    dist.all_to_all_single(received.detach(), send.detach(), *args, **kwargs)
    give_up = time.monotonic() + LET_GO_SECONDS
    while (holders(received), holders(send)) != before:
        assert time.monotonic() < give_up, "messages are still held"
        time.sleep(0)


def peak_of_step(run: RunConfig, replay: SlotTrace | None = None) -> Seen:
    """Build a run and train one step; the most bytes that the allocator had given out at once in the step."""
    instead = SimpleNamespace(**{**vars(dist), "all_to_all_single": all_to_all_and_let_go})
    with (
        patch.object(collectives, "dist", instead),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
    ):
        session = Session(run, replay)
        with record_function("the step"):
            session.step(0)
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    started = next(event.start_ns() for event in events if event.name() == "the step")
    held = peak = 0
    for event in events:
        held += event.nbytes() if event.name() == "[memory]" else 0
        if event.start_ns() > started:
            peak = max(peak, held)
    dense = sum(param.numel() for chunk in session.model.chunks for param in chunk.parameters())
    seen = session.seen
    seen.trace = session.tracer.recorded
    # Parameters, gradients and two moments.
    seen.extra = {"peak": peak, "dense": 4 * 4 * dense}
    tear_down(session.world)
    return seen


def deposits_of(run: RunConfig, slots: np.ndarray, rank: int, world_size: int) -> Deposits:
    """What a rank's shard is asked for in the step, from all slots `[tokens, M]` that were read."""
    plan = place(run, world_size).memories["memory"].plan
    part = plan.part_of(rank)
    mine = slots[(slots >= part.row_start) & (slots < part.row_end)]
    return Deposits(entries=mine.size, tokens=len(slots), rows=len(np.unique(mine)))


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("single", "row_adam"), ("columns", "row_adagrad"), ("rows", "row_adam"), ("rows", "bf16")],
)
def test_peak_memory_equals_weights_state_and_records(
    layout: str, settings: str, pool: RankPool, note_figure: Any
) -> None:
    world_size, sizes = LAYOUTS[layout]
    run = wide_run(32, **SETTINGS[settings], **sizes)
    history = joined(run, pool.run(world_size, peak_of_step, run))
    slots = np.concatenate([slots.reshape(-1, 8) for slots in history.trace.slots.values()])
    plan = place(run, world_size).memories["memory"].plan
    for rank, seen in enumerate(history.seen):
        part, deposits = plan.part_of(rank), deposits_of(run, slots, rank, world_size)
        value_bytes = run.value_bytes_of(run.memory)
        formula = peak_bytes(run.memory, part, value_bytes, deposits)
        # Each of the parts is large enough to be missed.
        weights = values_bytes(part, value_bytes) + state_bytes(run.memory, part, value_bytes)
        records = record_bytes(deposits, part.num_columns, value_bytes)
        assert min(weights, records) > 0.1 * formula
        deviation = seen.extra["peak"] / (formula + seen.extra["dense"]) - 1
        note_figure(f"peak memory over its formula, {layout}, {settings}", abs(deviation))
        assert abs(deviation) < 0.1, (rank, seen.extra, formula, weights, records)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory_grows_with_slots_by_the_shard_alone(layout: str, pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    small, large = wide_run(32, **sizes), wide_run(96, **sizes)
    chosen = joined(small, pool.run(world_size, peak_of_step, small))
    spread = SlotTrace()
    # The same reads from nine times the rows: slot 9 s lies in the row shard in which s lay.
    spread.slots = {key: 9 * slots for key, slots in chosen.trace.slots.items()}
    grown = joined(large, pool.run(world_size, peak_of_step, large, spread))
    for rank, (before, after) in enumerate(zip(chosen.seen, grown.seen, strict=True)):
        shard = 0
        for run, sign in ((small, -1), (large, 1)):
            plan = place(run, world_size).memories["memory"].plan
            part = plan.part_of(rank)
            shard += sign * (values_bytes(part, 4) + state_bytes(run.memory, part, 4))
        keys = after.extra["dense"] - before.extra["dense"]
        growth = after.extra["peak"] - before.extra["peak"]
        # Scores of 96 instead of 32 sub-keys a half, in one micro-batch of 64 tokens.
        assert abs(growth - shard - keys) < 0.02 * shard, (rank, growth, shard, keys)
