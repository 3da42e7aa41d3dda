"""The backend that a run chose reaches every part that computes with the table."""

from dataclasses import replace
from typing import Any

import pytest

from mempar.memory.layer import MemoryLayer
from mempar.runtime import bringup
from mempar.runtime.config import KernelsConfig, RunConfig
from rank_pool import RankPool
from toy import Session, toy_run


def backends_of(run: RunConfig) -> dict[str, Any]:
    session = Session(run)
    found: dict[str, Any] = {"world": session.world.backend}
    for table in session.model.tables:
        found[f"shard {table.name}"] = table.shard.backend
        found[f"optimizer {table.name}"] = session.optimizers.tables[table.name].settings.backend
    for name, access in session.model.access.items():
        found[f"access {name}"] = access.backend
    for chunk in session.model.chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, MemoryLayer):
                found[f"layer {name}"] = module.backend
    bringup.tear_down(session.world)
    return found


@pytest.mark.parametrize("kind", ["memory_plus", "two"])
def test_every_part_of_a_run_has_its_backend(kind: str, pool: RankPool) -> None:
    # Unlike the backend that is made by default.
    run = replace(toy_run(kind=kind), kernels=KernelsConfig(backend="torch", check_indices=True))
    (found,) = pool.run(1, backends_of, run)
    assert sum(name.startswith("layer") for name in found) > 1
    assert {name for name, backend in found.items() if backend != found["world"]} == set()
    assert found["world"].check_indices


def train_a_step(run: RunConfig) -> float:
    session = Session(run)
    report = session.step(0)
    bringup.tear_down(session.world)
    return report.loss


@pytest.mark.parametrize("parallel", [{}, {"mp": 2, "mp_rows": 2}, {"mp": 2}], ids=str)
def test_checking_indices_changes_nothing(parallel: dict[str, int], pool: RankPool) -> None:
    plain = toy_run(kind="peer", **parallel)
    checking = replace(plain, kernels=replace(plain.kernels, check_indices=True))
    ranks = parallel.get("mp", 1)
    assert pool.run(ranks, train_a_step, plain) == pool.run(ranks, train_a_step, checking)
