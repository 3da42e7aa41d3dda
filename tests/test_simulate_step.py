"""Laws of simulated steps: exact without links, never slower with better ones, the closed form without skew."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempar.recipes.published import PUBLISHED
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS, Hardware
from mempar.tools.plan.compute import block_compute_us, head_compute_us, is_recomputed
from mempar.tools.plan.step_time import step_time
from mempar.tools.plan.update import update_compute_us
from mempar.tools.simulate.critical_path import critical_path
from mempar.tools.simulate.loads import ZipfLoads
from mempar.tools.simulate.pipeline import walk
from mempar.tools.simulate.schedule import Pass
from mempar.tools.simulate.step import Disturbance, Step, picoseconds
from mempar.tools.simulate.timeline import COMPUTE, EXPOSED, KINDS, OVERLAPPED, WAITING, Timeline
from toy import VOCAB, toy_run

H200 = GPUS["h200"]
NO_LINKS = replace(
    H200, link_gb_per_s=float("inf"), network_gb_per_s=float("inf"), link_latency_us=0.0, network_latency_us=0.0
)
# (ranks, settings of a toy run): every dimension, variant and recomputation.
FLAT: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {"mp": 2}),
    (8, {"mp": 4, "mp_rows": 4}),
    (8, {"mp": 4, "mp_rows": 2, "mp_hops": 2}),
    (4, {"tp": 2, "mp": 2, "recompute": "full"}),
    (4, {"tp": 2, "sequence_parallel": True, "mp": 4, "mp_rows": 2, "recompute": "selective"}),
    (2, {"kind": "peer", "mp": 2, "mp_rows": 2}),
    (4, {"kind": "beside", "tp": 2, "mp": 2, "distributed_optimizer": True}),
    (4, {"kind": "memory+moe", "ep": 2}),
    (8, {"kind": "two", "mp": 2, "mp_rows": 2, "cp": 2}),
    (4, {"kind": "dense", "tied": True}),
]
PIPED: list[tuple[int, dict[str, Any]]] = [
    (2, {"pp": 2}),
    (4, {"pp": 2, "vpp": 2, "mp": 2, "mp_rows": 2}),
    (16, {"pp": 4, "micro_batches": 8, "mp": 4, "mp_rows": 2}),
    (8, {"pp": 2, "tp": 2, "mp": 2, "tied": True, "distributed_optimizer": True}),
]


def laid_out(num_ranks: int, toy: dict[str, Any]) -> Layout:
    return Layout.of(toy_run(**toy), num_ranks, VOCAB)


def disturbed(layout: Layout, zipf: float, jitter: float, seed: int = 1) -> Disturbance:
    return Disturbance(loads=ZipfLoads(layout, zipf, seed) if zipf else None, jitter=jitter, seed=seed)


def simulated(
    layout: Layout, hardware: Hardware = H200, *, zipf: float = 0.0, jitter: float = 0.0, seed: int = 1
) -> Step:
    return Step(layout, hardware, disturbed(layout, zipf if layout.run.memories else 0.0, jitter, seed))


def pass_ps(layout: Layout, stage: int, step: Pass) -> int:
    """Picoseconds that a chunk computes in a pass, from the planner's times alone."""
    run, chunk = layout.run, layout.chunks_of(stage)[step.chunk]
    total = 0
    for block in chunk.blocks:
        for phase, us in block_compute_us(run, layout, block, NO_LINKS).items():
            total += picoseconds(us.forward if step.is_forward else us.backward)
            if not step.is_forward and is_recomputed(run.train, phase):
                total += picoseconds(us.forward)
    if chunk.is_last:
        head = head_compute_us(run, layout, NO_LINKS)
        total += picoseconds(head.forward if step.is_forward else head.backward)
    return total


@pytest.mark.parametrize(("num_ranks", "toy"), FLAT + PIPED)
def test_without_links_a_step_is_its_computing(num_ranks: int, toy: dict[str, Any]):
    layout = laid_out(num_ranks, toy)
    step = simulated(layout, NO_LINKS)
    assert not step.timeline.spent(EXPOSED) and not step.timeline.spent(WAITING)
    # Passes as one number each, and the optimizers behind the reduction that all wait for.
    bare = Timeline(layout.grid.pp, 1)
    walk(
        bare,
        vpp=layout.run.parallel.vpp,
        num_micro_batches=layout.batch.num_micro_batches,
        compute=lambda stage, step: bare.compute(stage, "", pass_ps(layout, stage, step)),
        message_ps=lambda source, target: 0,
    )
    updates = [
        {
            name: picoseconds(us)
            for name, us in update_compute_us(layout.run, layout, stage, dense_bytes(layout, stage), NO_LINKS).items()
        }
        for stage in range(layout.grid.pp)
    ]
    ends = [int(clock[0]) for clock in bare.clocks]
    if layout.run.model.tie_embeddings:
        # Both ends of the pipeline sum the embedding's gradient before those of tables.
        assert layout.grid.pp <= 2
        ends = [max(ends)] * len(ends)
    reduced = max(end + update.get("reduce_rows", 0) for end, update in zip(ends, updates, strict=True))
    assert step.timeline.end == reduced + max(sum(each.values()) - each.get("reduce_rows", 0) for each in updates)
    if layout.grid.pp == 1:
        passes = sum(pass_ps(layout, 0, Pass(forward, 0, 0)) for forward in (True, False))
        assert step.timeline.end == layout.batch.num_micro_batches * passes + sum(updates[0].values())


@pytest.mark.parametrize(("num_ranks", "toy"), FLAT)
def test_without_skew_a_step_is_the_closed_form(num_ranks: int, toy: dict[str, Any]):
    layout = laid_out(num_ranks, toy)
    assert simulated(layout).timeline.end / 1e12 == pytest.approx(step_time(layout, H200).seconds, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "num_ranks", "parallel"),
    [
        ("8b_memory_plus_16m_128xh100_bf16", 128, {"pp": 2, "mp": 64, "mp_rows": 8}),
        ("8b_memory_plus_16m_128xh100_bf16", 128, {"pp": 4, "mp": 32, "mp_rows": 8}),
        ("8b_memory_plus_16m_128xh100_bf16", 128, {"pp": 4, "vpp": 2, "mp": 8, "mp_rows": 8, "mp_hops": 1}),
        ("8b_memory_plus_16m_128xh100_bf16", 128, {"pp": 8, "mp": 16, "mp_rows": 8}),
        ("1.3b_memory_plus_64m_64xh200_bf16", 64, {"pp": 2, "mp": 32, "mp_rows": 8}),
        ("8b_dense_128xh100_bf16", 128, {"pp": 4, "vpp": 4}),
    ],
)
def test_pipelines_without_skew_are_close_to_the_closed_form(
    name: str, num_ranks: int, parallel: dict[str, int], note_figure: Callable[[str, float], None]
):
    run = PUBLISHED[name]().with_parallel(**parallel)
    layout = Layout.of(replace(run, train=replace(run.train, global_batch_size=256)), num_ranks, 128256)
    step, plan = simulated(layout), step_time(layout, H200)
    simulation = step.timeline.end / 1e12
    note_figure("simulated pipeline, off the closed form", abs(simulation / plan.seconds - 1))
    # The form lets every message be waited for, and no stage sum gradients while the pipeline drains.
    hidden = sum(plan.parts.get(name, 0.0) for name in ("send/pp", "reduce_rows", "reduce_scatter/dp", "all_reduce/tp"))
    # Interleaved chunks are not equally long, which the form takes them to be.
    above = 1e-7 if layout.run.parallel.vpp == 1 else 0.005
    assert plan.seconds - hidden / 1e6 <= simulation <= (1 + above) * plan.seconds


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(FLAT + PIPED),
    factors=st.tuples(*[st.floats(1.0, 50.0)] * 4),
    zipf=st.sampled_from([0.0, 1.1]),
    jitter=st.sampled_from([0.0, 0.1]),
)
def test_better_links_never_slow(
    case: tuple[int, dict[str, Any]], factors: tuple[float, ...], zipf: float, jitter: float
):
    layout = laid_out(*case)
    better = replace(
        H200,
        link_gb_per_s=H200.link_gb_per_s * factors[0],
        network_gb_per_s=H200.network_gb_per_s * factors[1],
        link_latency_us=H200.link_latency_us / factors[2],
        network_latency_us=H200.network_latency_us / factors[3],
    )
    plain, fast = (simulated(layout, links, zipf=zipf, jitter=jitter) for links in (H200, better))
    assert all(
        (after <= before).all() for before, after in zip(plain.timeline.clocks, fast.timeline.clocks, strict=True)
    )


@pytest.mark.parametrize(("num_ranks", "toy"), [FLAT[3], PIPED[1], PIPED[2]])
def test_step_repeats_with_its_seed(num_ranks: int, toy: dict[str, Any]):
    layout = laid_out(num_ranks, toy)
    one, again, other = (simulated(layout, zipf=1.1, jitter=0.05, seed=seed).timeline for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(one.clocks, again.clocks, strict=True))
    assert one.end != other.end
    assert sum(segment.picoseconds for segment in critical_path(one)) == one.end
    for kind in (COMPUTE, EXPOSED):
        assert one.spent(kind).keys() == again.spent(kind).keys()


@pytest.mark.parametrize(("num_ranks", "toy"), FLAT + PIPED)
def test_every_picosecond_of_a_rank_is_accounted_for(num_ranks: int, toy: dict[str, Any]):
    timeline = simulated(laid_out(num_ranks, toy), zipf=1.2, jitter=0.1).timeline
    spent = [timeline.spent(kind) for kind in KINDS if kind != OVERLAPPED]
    total = sum(sum(each.values()) for each in spent)
    assert (total == np.stack(timeline.clocks)).all()


@pytest.mark.parametrize("first", [(1,), (3,)])
def test_copies_of_every_memory_are_summed_once(first: tuple[int, ...]):
    run = toy_run(kind="two", pp=2, vpp=1, mp=2)
    # One has its layers on both stages, the other, which is listed first, on one of them; both have replicas.
    run = replace(
        run,
        memory=replace(run.memory, layers=first),
        more_memories=(replace(run.more_memories[0], layers=(0, 2)),),
    )
    layout = Layout.of(run, 8, VOCAB)
    assert [len(placed.stages) for placed in layout.placement.memories.values()] == [1, 2]
    tasks = [task for task in simulated(layout).timeline.tasks if task.phase == "copy_sync"]
    assert [len(task.stages) for task in tasks] == [1, 2] if first == (1,) else [2, 1]


def wide(columns: int) -> RunConfig:
    """A run whose reads are what takes longest: a wide table, many reads, on eight ranks of a node."""
    run = toy_run(mp=8, mp_rows=8 // columns, micro_batches=8, global_batch_size=64)
    return replace(
        run,
        memory=replace(run.memory, num_subkeys=512, top_k=64, heads=8, value_dim=1024, column_tile=128),
        train=replace(run.train, seq_length=512),
    )


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_skew_slows_row_shards_and_leaves_columns_alone(columns: int):
    layout = Layout.of(wide(columns), 8, VOCAB)
    ends = [simulated(layout, zipf=exponent).timeline.end for exponent in (0.0, 0.7, 0.9, 1.1, 1.4)]
    if columns == 8:
        assert len(set(ends)) == 1
    else:
        assert ends == sorted(ends) and ends[-1] > 1.02 * ends[0]


def test_merged_reads_that_fall_evenly_are_gathered_as_planned():
    run = wide(1)
    gathered = []
    for merge in ("off", "on"):
        # So small a table that a tenth of its reads are duplicates.
        memory = replace(run.memory, num_subkeys=32, top_k=32, merge_duplicates=merge)
        layout = Layout.of(replace(run, memory=memory), 8, VOCAB)
        even = Step(layout, H200, Disturbance()).timeline.spent(COMPUTE)["gather"]
        # Zipf's law of no skew: drawn, and even but for chance.
        drawn = Step(layout, H200, Disturbance(loads=ZipfLoads(layout, 0.0, 1))).timeline.spent(COMPUTE)["gather"]
        gathered.append(drawn.mean() / even.mean())
    assert gathered == pytest.approx([1.0, 1.0], rel=1e-3)


def test_skew_shows_as_waiting_of_the_others():
    layout = Layout.of(wide(1), 8, VOCAB)
    step = simulated(layout, zipf=1.4)
    waited = sum(step.timeline.spent(WAITING).values())[0]
    busiest = int(step.entries[0].argmax())
    assert waited[busiest] == waited.min() < waited.mean()


def test_jitter_slows_a_step_and_keeps_its_mean():
    layout = laid_out(8, {"mp": 4, "mp_rows": 4, "micro_batches": 8})
    calm, uneven = (simulated(layout, jitter=sigma).timeline for sigma in (0.0, 0.2))
    assert uneven.end > calm.end
    computed = [sum(float(each.mean()) for each in timeline.spent(COMPUTE).values()) for timeline in (calm, uneven)]
    assert computed[1] == pytest.approx(computed[0], rel=0.1)


def test_thousands_of_ranks_in_seconds(note_figure: Callable[[str, float], None]):
    run = PUBLISHED["8b_memory_plus_16m_128xh100_bf16"]()
    run = replace(run, train=replace(run.train, global_batch_size=8192)).with_parallel(pp=4, mp=64, mp_rows=8)
    layout = Layout.of(run, 4096, 128256)
    started = time.process_time()
    step = simulated(layout, zipf=1.1, jitter=0.02)
    path = critical_path(step.timeline)
    seconds = time.process_time() - started
    note_figure("simulating 4096 ranks, seconds", seconds)
    assert sum(segment.picoseconds for segment in path) == step.timeline.end
    assert seconds < 30
