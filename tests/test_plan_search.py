"""Which layouts a plan has: the fastest of all that fit, in time, with every change of training said."""

import dataclasses
import functools
import itertools
import time

import pytest

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.recipes import find_recipe
from mempar.runtime.config import ModelConfig, MoeConfig, RunConfig, TrainConfig
from mempar.runtime.estimate import check_fits, estimate
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.hardware import GPUS, Hardware
from mempar.runtime.overrides import override
from mempar.runtime.placement import place, resolve
from mempar.tools.plan import planner
from mempar.tools.plan import search as search_module
from mempar.tools.plan.explain import explain
from mempar.tools.plan.layouts import Grid, Skeleton, divisors, grids, laid_out, skeletons
from mempar.tools.plan.planner import Planned, plan_run
from mempar.tools.plan.report import report
from mempar.tools.plan.search import SPARE_SHARE, Plan, all_reasons, search
from mempar.tools.plan.settings import settings_of
from mempar.tools.plan.step_time import step_time

H200 = GPUS["h200"]
SMALL = RunConfig(
    model=ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, ffn_hidden_size=512, vocab_size=1024),
    memory=MemoryConfig(layers=(1, 3), num_subkeys=64, heads=2, top_k=8, key_dim=64, column_tile=64),
    train=TrainConfig(global_batch_size=32, micro_batch_size=2, seq_length=256),
)
EIGHT_B, LARGEST = "8b_memory_plus_16m_128xh100_bf16", "1.3b_memory_plus_64m_64xh200_bf16"
# Seconds of a core; the command may take ten.
MOST_SECONDS = 5.0


@functools.cache
def planned(recipe: str, num_gpus: int, gpu: str = "h200") -> tuple[Planned, float]:
    """A plan, and what it took of a core."""
    start = time.process_time()
    found = plan_run(find_recipe(recipe), num_gpus, GPUS[gpu], top=5)
    return found, time.process_time() - start


def small_gpu(num_bytes: int) -> Hardware:
    return dataclasses.replace(H200, memory_bytes=num_bytes)


SMALL_ON_8 = dataclasses.replace(SMALL, hardware=dataclasses.replace(SMALL.hardware, gpu="h200", gpus=8))
# Seconds, bytes, layout, recomputation.
Looked = tuple[float, int, tuple[Skeleton, Grid], str]


@functools.cache
def every_layout() -> list[Looked]:
    run, every = SMALL_ON_8, []
    for skeleton in skeletons(run, 8, H200):
        for grid, recompute in itertools.product(grids(run, 8 // skeleton.pp), ("none", "selective", "full")):
            try:
                layout = Layout.of(laid_out(run, skeleton, grid, recompute), 8, 1024)
            except ConfigError:
                continue
            needed = estimate(layout.run, 8, 1024).worst.total
            every.append((step_time(layout, H200).seconds, needed, (skeleton, grid), recompute))
    return every


def fastest_with_room(most: int) -> list[Looked]:
    """The fastest that fit comfortably; more recomputation of a layout that fits with less is never wanted."""
    fits = [each for each in every_layout() if each[1] <= (1 - SPARE_SHARE) * most]
    least: dict[tuple[Skeleton, Grid], Looked] = {}
    for each in sorted(fits, key=lambda each: each[0]):
        least.setdefault(each[2], each)
    return sorted(least.values(), key=lambda each: each[0])[:8]


def memory_that_fits_barely() -> int:
    """Of a GPU that some layout fits barely, which is among the fastest with more recomputation."""
    needed = {(layout, recompute): num_bytes for _, num_bytes, layout, recompute in sorted(every_layout())}
    for (layout, recompute), num_bytes in needed.items():
        plain = needed.get((layout, "none"), 0)
        most = int((num_bytes + plain) / 2 / (1 - SPARE_SHARE))
        chosen = [each[2:] for each in fastest_with_room(most)]
        if recompute != "none" and num_bytes < plain <= most and (layout, recompute) in chosen:
            return most
    raise AssertionError("no layout is among the fastest only because it computes something again")


@pytest.mark.parametrize("room", ["enough", "tight", "barely"])
def test_plans_are_the_fastest_of_all_that_fit(room: str) -> None:
    """Against looking at every layout: the same steps in the same order."""
    # Everything needs 3.0 GiB of contexts and more; half of all layouts fit the tight one.
    sizes = sorted(needed for _, needed, *_ in every_layout())
    most = {
        "enough": lambda: sizes[-1] * 2, "tight": lambda: sizes[len(sizes) // 4], "barely": memory_that_fits_barely,
    }[room]()  # fmt: skip
    found = search(SMALL_ON_8, 8, small_gpu(most), vocab=1024, top=8)
    assert [plan.time.seconds for plan in found.plans] == pytest.approx([each[0] for each in fastest_with_room(most)])
    assert all(plan.memory_bytes <= (1 - SPARE_SHARE) * most for plan in found.plans)
    if room == "tight":
        assert sum(each.count for each in all_reasons(found)) > 0
    if room == "barely":
        assert any(plan.layout.run.train.recompute != "none" for plan in found.plans)


@pytest.mark.parametrize(("recipe", "gpus"), [(EIGHT_B, 128), (LARGEST, 64), (LARGEST, 8)])
def test_published_recipes_are_planned_in_seconds(recipe: str, gpus: int) -> None:
    """8b + 64B on 128 H200, 1.3b + 128B on 64 and on 8: plans that fit, ranked."""
    found, seconds = planned(recipe, gpus)
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    plans = found.found.plans
    assert len(plans) == 5 and all(plan.memory_bytes <= H200.memory_bytes for plan in plans)
    steps = [plan.time.seconds for plan in plans]
    assert steps == sorted(steps)
    # Layouts only: training is as the recipe has it wherever that fits.
    assert bool(found.changes) == (gpus == 8)
    if found.own is not None:
        assert found.own.time.seconds >= steps[0]


def test_128b_memory_parameters_fit_one_node_of_eight() -> None:
    """137B values in bf16, with the optimizer named and the smaller batch too; as it is, it wants 16."""
    found, _ = planned(LARGEST, 8)
    best = found.found.plans[0]
    assert best.layout.run.memory.optimizer == "row_adagrad"
    assert any(change.startswith("memory.optimizer=row_adagrad instead of row_adam") for change in found.changes)
    assert any("train.global_batch_size=512 instead of 2048" in change for change in found.changes)
    run, given = best.layout.run, find_recipe(LARGEST)
    tokens = [each.train.steps * each.train.global_batch_size for each in (run, given)]
    assert 0 <= tokens[0] - tokens[1] < run.train.global_batch_size
    values = best.estimate.worst.table_values
    assert values == 8192**2 * 2048 * 2 // 8
    assert best.memory_bytes <= (1 - SPARE_SHARE) * H200.memory_bytes
    assert found.enough_gpus == 16
    again, _ = planned(LARGEST, 16)
    assert again.found.plans and not again.changes


@pytest.mark.parametrize(("recipe", "gpus"), [(EIGHT_B, 128), (LARGEST, 64), (LARGEST, 8)])
def test_settings_of_a_plan_make_the_run_that_was_planned(recipe: str, gpus: int) -> None:
    found, _ = planned(recipe, gpus)
    for plan in found.found.plans:
        run = override(find_recipe(recipe), settings_of(found.given, plan.layout.run))
        assert run == plan.layout.run
        assert check_fits(resolve(run, gpus), gpus).worst.total == plan.memory_bytes
        assert place(resolve(run, gpus), gpus).grid == plan.layout.grid


def test_settings_of_several_memories_are_read_again() -> None:
    more = dataclasses.replace(SMALL.memory, layers=(2,), num_subkeys=16, variant="peer", lr=0.5)
    given = dataclasses.replace(SMALL, more_memories=(more,))
    changed = dataclasses.replace(given, more_memories=(dataclasses.replace(more, optimizer="row_adagrad"),))
    assert override(given, settings_of(given, changed)) == changed


@pytest.mark.parametrize("recipe", ["8b_dense_128xh100_bf16", EIGHT_B])
def test_more_gpus_take_fewer_days(recipe: str) -> None:
    steps = [planned(recipe, gpus)[0].found.plans[0].time.seconds for gpus in (64, 128, 256)]
    assert steps[0] > steps[1] > steps[2]


def test_more_memory_is_never_slower() -> None:
    steps = []
    for share in (0.45, 0.6, 1.0, 4.0):
        hardware = small_gpu(int(share * H200.memory_bytes))
        found = plan_run(find_recipe(LARGEST), 64, hardware, top=1)
        assert not found.changes
        steps.append(found.found.plans[0].time.seconds)
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_nothing_fits_and_what_would_help_is_said() -> None:
    found = plan_run(find_recipe(LARGEST), 1, H200, top=3)
    assert not found.found.plans and not found.changes
    assert found.nearest is not None and found.nearest.worst.total > 10 * H200.memory_bytes
    assert found.enough_gpus == 16 and any("row_adagrad" in advice for advice in found.advice)
    reasons = list(all_reasons(found.found))
    assert reasons and all("of 140.4 GiB" in each.reason for each in reasons)
    assert sum(each.count for each in reasons) == found.found.num_looked


def test_training_changes_no_more_than_it_must() -> None:
    """A table whose float32 state does not fit keeps its optimizer, with narrower moments and values."""
    given = find_recipe("1.3b_memory_plus_16m_64xh100_bf16")
    whole, _ = planned(given.name, 8)
    assert not whole.changes and whole.run.memory == given.memory
    tight = plan_run(given, 8, GPUS["a100"], top=1)
    assert tight.changes == (
        "memory.moments_dtype=bf16 instead of float32", "memory.rounding=stochastic instead of master",
    )  # fmt: skip
    assert tight.run.memory.optimizer == "row_adam"


def own_without_room(share: float) -> tuple[Plan, Planned]:
    """A run on 8 GPUs whose own layout, as a plan, needs so much of their memory; and what is planned."""
    given = SMALL_ON_8.with_parallel(mp=2, mp_rows=2)
    alone = plan_run(given, 8, H200, top=3).own
    assert alone is not None
    return alone, plan_run(given, 8, small_gpu(int(alone.memory_bytes / share)), top=3)


def test_own_layout_is_judged_by_the_same_margin() -> None:
    """Within 5% of all memory it is none of the plans, and said to fit barely."""
    alone, found = own_without_room(0.97)
    assert found.own is not None and found.own.memory_bytes == alone.memory_bytes
    assert all(plan is not found.own for plan in found.found.plans)
    assert "which fits barely" in report(found, ["small"])
    alone, found = own_without_room(0.9)
    assert found.own is not None and "which fits barely" not in report(found, ["small"])


def test_own_layout_that_is_faster_than_all_that_are_listed_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layouts.py leaves out may be the recipe's own: here its size of micro-batches, as if nobody tried it."""
    usual = plan_run(SMALL_ON_8, 8, H200, top=3)
    fastest = usual.found.plans[0]
    given = dataclasses.replace(fastest.layout.run, name="given")
    sizes = {each.micro_batch_size for each in skeletons(given, 8, H200)} - {given.train.micro_batch_size}

    def without(*arguments: object) -> list[Skeleton]:
        return [each for each in skeletons(*arguments) if each.micro_batch_size in sizes]  # type: ignore[arg-type]

    for module in (planner, search_module):
        monkeypatch.setattr(module, "skeletons", without)
    found = plan_run(given, 8, H200, top=3)
    assert found.own is found.found.plans[0] and len(found.found.plans) == 3
    steps = [plan.time.seconds for plan in found.found.plans]
    assert steps == sorted(steps) and steps[0] == pytest.approx(fastest.time.seconds)
    assert "the first is the layout that the recipe brings along" in report(found, ["small"])
    assert "the recipe's own (" not in explain(found)


def test_tensor_parallelism_stays_in_a_node_and_divides_heads() -> None:
    run = find_recipe(EIGHT_B)
    found = skeletons(run, 256, H200)
    assert {each.tp for each in found} == {1, 2, 4, 8}
    assert all(run.model.num_layers % (each.pp * each.vpp) == 0 for each in found)
    assert {each.cp for each in found} == {1}
    long = dataclasses.replace(run, train=dataclasses.replace(run.train, seq_length=65536, global_batch_size=128))
    assert {each.cp for each in skeletons(long, 256, H200)} == {1, 2, 4, 8}
    on_cpus = dataclasses.replace(H200, gpu="")
    assert {each.cp for each in skeletons(long, 256, on_cpus)} == {1}
    experts = dataclasses.replace(
        SMALL, memory=MemoryConfig(enabled=False), moe=MoeConfig(num_experts=4, ffn_hidden_size=128)
    )
    assert {each.ep for each in skeletons(experts, 4, H200)} == {1, 2, 4}


def test_tables_are_cut_on_every_grid_that_has_tiles() -> None:
    assert grids(dataclasses.replace(SMALL, memory=MemoryConfig(enabled=False)), 8) == [Grid()]
    found = grids(SMALL, 8)
    # 256 columns have four tiles.
    assert {(grid.mp, grid.mp_rows) for grid in found} == {
        (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8),
    }  # fmt: skip
    assert {grid.mp_rows for grid in found if grid.mp_hops == 2} == {2, 4}


@pytest.mark.parametrize(
    ("gpus", "top", "message"), [(0, 5, "plans for no GPU"), (8, 0, "asks for no plan"), (-1, 5, "plans for no GPU")]
)
def test_numbers_that_are_none_are_refused(gpus: int, top: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(SMALL, gpus, H200, top=top)


def test_divisors_are_all_there() -> None:
    for number in (1, 2, 12, 49, 97, 360):
        assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


def test_very_many_gpus_are_refused_at_once() -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match="allows no layout"):
        plan_run(SMALL, 10**9, H200, top=1)
    assert time.process_time() - start < 1


def test_gpus_that_allow_no_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"allows no layout of run.*global_batch_size=32"):
        plan_run(SMALL, 8 * 4 * 33 * 7, H200, top=1)
