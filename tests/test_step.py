"""One pass over a batch (mempar.runtime.step): evaluation and training see the same losses."""

from typing import Any

import pytest
import torch

from mempar.runtime.bringup import tear_down
from mempar.runtime.config import RunConfig
from rank_pool import RankPool
from toy import Session, batches_of, toy_run


def evaluate_then_train(run: RunConfig) -> dict[str, Any]:
    """Evaluate a batch and train on it; what both say of it, and whether evaluating changed anything."""
    session = Session(run)
    batches = batches_of(run, 0, dp_rank=session.grid.dp_rank(session.world.rank), dp=session.grid.dp)
    params = [param for chunk in session.model.chunks for param in chunk.parameters()]
    tables = [table.shard.values for table in session.model.tables]
    before = [tensor.detach().clone() for tensor in (*params, *tables)]
    loss_sum, tokens = session.stepper.evaluate(batches)
    unchanged = all(torch.equal(*pair) for pair in zip(before, (*params, *tables), strict=True))
    deposits = sum(table.shard.record_bytes for table in session.model.tables)
    report = session.step(0)
    moved = not all(torch.equal(*pair) for pair in zip(before, (*params, *tables), strict=True))
    tear_down(session.world)
    return {
        "evaluated": (loss_sum / tokens, tokens),
        "trained": (report.loss, report.tokens),
        "unchanged": unchanged,
        "deposits": deposits,
        "moved": moved,
    }


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {}), (2, {"mp": 2, "mp_rows": 2}), (2, {"pp": 2})])
def test_evaluation_sees_the_loss_of_training_and_changes_nothing(
    world_size: int, sizes: dict[str, int], pool: RankPool
) -> None:
    run = toy_run(dtype="float64", ragged=True, **sizes)
    for seen in pool.run(world_size, evaluate_then_train, run):
        assert seen["evaluated"] == pytest.approx(seen["trained"], rel=1e-12)
        assert seen["unchanged"] and seen["moved"] and seen["deposits"] == 0
