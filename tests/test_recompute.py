"""Activations that are computed again: the same numbers bit for bit, every row gradient deposited once.

That the exchange runs again is the bytes law's matter, that other layouts agree the layout law's.
"""

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from mempar.memory.values import ValueShard
from mempar.runtime.config import RunConfig
from mempar.runtime.in_flight import Pass
from mempar.runtime.model import transformer_config
from rank_pool import RankPool
from toy import Seen, Session, batches_of, toy_run, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "mp2-rows": (2, {"kind": "beside", "mp": 2, "mp_rows": 2}),
    "tp2-mp2-columns": (2, {"kind": "peer", "tp": 2, "mp": 2, "mp_rows": 1}),
    "tp2-sp-mp2-rows": (2, {"tp": 2, "sequence_parallel": True, "mp": 2, "mp_rows": 2, "dtype": "bf16"}),
    "pp2-copies": (2, {"kind": "two", "pp": 2, "micro_batches": 6}),
    "pp2-vpp2-mp2-rows": (4, {"kind": "memory", "pp": 2, "vpp": 2, "mp": 2, "mp_rows": 2, "micro_batches": 8}),
}
STEPS = 2


def train_watched(run: RunConfig, steps: int) -> Seen:
    """Train; note how often memory layers were computed, first and again, and how often gradients were deposited."""
    counted: Counter[str] = Counter()

    def observe(session: Session, seen: Seen) -> None:
        seen.extra["counted"] = counted
        # A batch that does not go round, before anything is trained.
        batches = batches_of(
            replace(run, train=replace(run.train, global_batch_size=3)),
            0,
            dp_rank=session.grid.dp_rank(session.world.rank),
            dp=session.grid.dp,
        )
        seen.extra["evaluated"] = session.stepper.evaluate(batches)

        def factory(block: int, length: int, current: Pass) -> Any:
            counted["again" if current.again else "first"] += 1
            return session.tracer(block, length, current)

        session.model.hook_slots(factory)
        for table in session.model.tables:
            count_deposits(table.shard, counted)

    return train(run, steps, keep=("slots",), observe=observe)


def count_deposits(shard: ValueShard, counted: Counter[str]) -> None:
    deposit = shard.backward

    def counting(*args: Any) -> Any:
        counted["deposits"] += 1
        return deposit(*args)

    shard.backward = counting  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_changes_no_bit_and_deposits_once(layout: str, pool: RankPool) -> None:
    world_size, settings = LAYOUTS[layout]
    kept = pool.submit(world_size, train_watched, toy_run(**settings), STEPS)
    again = {
        name: pool.submit(
            world_size, train_watched, toy_run(recompute=name, recompute_modules=modules, **settings), STEPS
        )
        for name, modules in (("selective", ("mlp", "core_attn")), ("full", ("mlp",)))
    }
    expected = kept.result()
    assert sum(seen.extra["counted"]["deposits"] for seen in expected) > 0
    for name, job in again.items():
        for rank, (seen, plain) in enumerate(zip(job.result(), expected, strict=True)):
            where = f"{name}, rank {rank}"
            assert seen.reports == plain.reports, where
            assert seen.digests == plain.digests, where
            assert seen.extra["evaluated"] == plain.extra["evaluated"], where
            counted, plainly = seen.extra["counted"], plain.extra["counted"]
            assert plainly["again"] == 0
            assert counted["again"] == counted["first"] == plainly["first"], where
            assert counted["deposits"] == plainly["deposits"], where


def test_attention_alone_leaves_the_memory_as_it_is(pool: RankPool) -> None:
    run = toy_run(recompute="selective", recompute_modules=("core_attn",))
    (seen,), (plain,) = pool.run(1, train_watched, run, STEPS), pool.run(1, train_watched, toy_run(), STEPS)
    assert seen.extra["counted"] == plain.extra["counted"]
    assert (seen.reports, seen.digests) == (plain.reports, plain.digests)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_computed_again_does_not_depend_on_the_data_or_the_rank(recompute: str) -> None:
    # The exchange runs again with its layer: every rank must repeat the same layers in the same order.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = transformer_config(toy_run(recompute=recompute, recompute_modules=("mlp", "core_attn"), pp=2))
    assert config.recompute_granularity == (None if recompute == "none" else recompute)
    assert config.num_microbatches_with_partial_activation_checkpoints is None
    assert not config.distribute_saved_activations
    assert config.hybrid_context_parallel is False
    assert not config.overlap_moe_expert_parallel_comm
