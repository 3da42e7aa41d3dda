"""Steps that are not finite on one rank are skipped on all and leave no trace; what went wrong is named."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.runtime import bringup, divergence
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import logical_parameters
from mempar.runtime.optim import RowGradient, StepReport
from mempar.runtime.schedule import full_rates
from rank_pool import RankPool
from toy import Session, batches_of, toy_run

NORM = "decoder.final_layernorm.weight"
# The distributed optimizer's last rank holds a share of it.
EMBEDDING = "embedding.word_embeddings.weight"
SPLIT = "decoder.layers.0.mlp.linear_fc2.weight"
# name: ranks, run, what is spoiled, on which rank.
FAULTS: dict[str, tuple[int, RunConfig, str, int]] = {
    "copy of a norm on one tensor rank": (2, toy_run(tp=2), NORM, 1),
    "share of a matrix on one tensor rank": (2, toy_run(tp=2, mp=2), SPLIT, 1),
    "copy on one data rank": (2, toy_run(dtype="bf16"), SPLIT, 1),
    "distributed optimizer": (2, toy_run(dtype="bf16", distributed_optimizer=True), EMBEDDING, 1),
    "record on one memory rank": (4, toy_run(mp=2, mp_rows=2), "record", 3),
    "loss on the last stage": (2, toy_run(pp=2), "loss", 1),
}


def snapshot(session: Session) -> list[Tensor]:
    """Everything that a step changes on this rank."""
    model, optimizers = session.model, session.optimizers
    tensors = [param.detach() for chunk in model.chunks for param in chunk.parameters()]
    for member in optimizers.members:
        for main, state in member.optimizer.state.items():
            tensors += [main.detach(), *(value for value in state.values() if isinstance(value, Tensor))]
    for table in model.tables:
        optimizer = optimizers.tables[table.name]
        tensors += [table.shard.values, *optimizer.state.values(), torch.tensor(optimizer.step)]
    return [tensor.clone() for tensor in tensors]


def spoil(session: Session, what: str) -> Callable[[], None]:
    """Make the next step of this rank not finite; returns what heals it."""
    model, stepper = session.model, session.stepper
    if what == "record":
        table = model.tables[0].shard
        take = table.take_gradient

        def spoiled() -> tuple[Tensor, Tensor]:
            table._records[0].grad[0, 0] = float("inf")
            return take()

        table.take_gradient = spoiled  # type: ignore[method-assign]
        return lambda: setattr(table, "take_gradient", take)
    if what == "loss":
        forward = stepper._forward

        def infinite(cursor: Any, chunk: Any) -> tuple[Tensor, Any]:
            output, loss = forward(cursor, chunk)
            return output, lambda losses: loss(losses * float("inf"))

        stepper._forward = infinite  # type: ignore[method-assign]
        return lambda: setattr(stepper, "_forward", forward)
    finalize = model.transformer.finalize_model_grads_func

    def finalize_and_spoil(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for logical in logical_parameters(model.chunks[0], tp=1, tp_rank=0, ep_rank=0):
            if logical.name == what:
                logical.param.main_grad.fill_(float("nan"))

    model.transformer.finalize_model_grads_func = finalize_and_spoil
    return lambda: setattr(model.transformer, "finalize_model_grads_func", finalize)


def skip_a_step(run: RunConfig, what: str, where: int) -> dict[str, Any]:
    """Train a step, a spoiled one, and another; what each left behind."""
    session = Session(run)
    reports, named = [session.step(0)], []
    before = snapshot(session)
    heal = spoil(session, what) if session.world.rank == where else lambda: None

    def inspect(report: StepReport, gradients: dict[str, RowGradient]) -> None:
        named.extend(divergence.name_not_finite(session.optimizers, gradients))

    grid = session.grid
    batches = batches_of(run, 1, dp_rank=grid.dp_rank(session.world.rank), dp=grid.dp)
    reports.append(session.stepper.train(batches, full_rates(run), inspect))
    untouched = all(map(torch.equal, before, snapshot(session)))
    records = sum(table.shard.record_bytes for table in session.model.tables)
    heal()
    reports.append(session.step(1))
    bringup.tear_down(session.world)
    return {"reports": reports, "named": named, "untouched": untouched, "tensors": len(before), "records": records}


def two_steps(run: RunConfig) -> list[StepReport]:
    session = Session(run)
    reports = [session.step(step) for step in range(2)]
    bringup.tear_down(session.world)
    return reports


@pytest.mark.parametrize("fault", FAULTS)
def test_step_that_is_not_finite_on_one_rank_leaves_no_trace_on_any(fault: str, pool: RankPool) -> None:
    world_size, run, what, where = FAULTS[fault]
    healthy = pool.submit(world_size, two_steps, run)
    seen = pool.run(world_size, skip_a_step, run, what, where)
    expected = healthy.result()[0]
    for rank, view in enumerate(seen):
        first, skipped, second = view["reports"]
        assert not skipped.applied, f"rank {rank}"
        assert view["untouched"]
        assert view["tensors"] > 20
        assert view["records"] == 0
        # Nothing of it is left: the next step is the one that would have been without it.
        assert [first, second] == expected
        assert view["named"] == seen[0]["named"]
    named = seen[0]["named"]
    if what == "record":
        assert len(named) == 1
        # The records of a token: the slots that it read in this shard, on both holders of the shard.
        assert re.fullmatch(r"rows .* of memory\.values \(on ranks 1, 3\)", named[0])
        slots = re.findall(r"\d+", named[0].partition("(")[0])
        assert slots and all(72 <= int(slot) < 144 for slot in slots)
    elif what == "loss":
        assert len(named) == divergence.NUM_NAMED + 2, named
        assert "more parameters" in named[divergence.NUM_NAMED]
    else:
        assert named == [f"{what} (on rank 1)"]


def spoiled_gradients(run: RunConfig, grown: str, factor: float, slot: int) -> list[str]:
    """Names after a few steps and one in which a parameter's and a row's gradients are much larger."""
    session = Session(run)
    for step in range(4):
        session.step(step)
    named: list[str] = []
    finalize = session.model.transformer.finalize_model_grads_func

    def finalize_and_grow(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for chunk in session.model.chunks:
            for logical in logical_parameters(chunk, tp=1, tp_rank=0, ep_rank=0):
                if logical.name == grown:
                    logical.param.main_grad.mul_(factor)

    session.model.transformer.finalize_model_grads_func = finalize_and_grow

    def inspect(report: StepReport, gradients: dict[str, RowGradient]) -> None:
        for table in session.model.tables:
            rows, grads = gradients[table.name]
            grads[rows + table.shard.part.row_start == slot] = 1000.0
        named.extend(divergence.name_diverged(session.optimizers, gradients))

    grid = session.grid
    batches = batches_of(run, 0, dp_rank=grid.dp_rank(session.world.rank), dp=grid.dp)
    session.stepper.train(batches, full_rates(run), inspect)
    bringup.tear_down(session.world)
    return named


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (4, {"tp": 2, "mp": 4, "mp_rows": 2}), (2, {"distributed_optimizer": True, "mp": 2, "mp_rows": 1})],
    ids=["single", "tp2-mp4-grid", "distributed-optimizer"],
)
def test_what_diverged_is_named(world_size: int, layout: dict[str, Any], pool: RankPool) -> None:
    run = toy_run(**layout)
    run = replace(run, memory=replace(run.memory, layers=(1, 2)))
    seen = pool.run(world_size, spoiled_gradients, run, SPLIT.replace("0", "3"), 500.0, 77)
    named = seen[0]
    assert all(view == named for view in seen)
    assert len(named) == divergence.NUM_NAMED + 1
    assert named[0].startswith(f"{SPLIT.replace('0', '3')} (gradient ")
    growth = [float(phrase.split(", ")[1].split()[0]) for phrase in named[:-1]]
    assert growth == sorted(growth, reverse=True)
    assert 100.0 < growth[0] < 5000.0
    assert growth[1] < 10.0
    # 24 columns of 1000, whatever shards they lie on.
    assert named[-1].startswith(f"memory.values: rows 77 (gradient {1000.0 * 24**0.5:.3g}), ")
