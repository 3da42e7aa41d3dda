"""Where ranks, blocks and shards lie; what `auto` settings become."""

from dataclasses import replace

import pytest

from config_samples import BASE, MEMORY, MODEL
from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import ParallelConfig, RunConfig, TrainConfig
from mempar.runtime.placement import Placement, colocating_vpp, place, resolve, stage_of_layer


@pytest.mark.parametrize(
    ("sizes", "world"),
    [({}, 1), ({"tp": 2, "mp": 3}, 6), ({"tp": 2, "pp": 2, "mp": 4}, 8), ({"tp": 4, "cp": 3, "pp": 2, "mp": 6}, 24)],
)
def test_smallest_world_is_the_first_that_can_be_placed(sizes: dict[str, int], world: int) -> None:
    assert ParallelConfig(**sizes).smallest_world == world
    # A length that cp=3 divides.
    run = replace(BASE, train=replace(BASE.train, seq_length=36)).with_parallel(**sizes)
    assert place(run, world).grid.world == world
    for smaller in range(1, world):
        with pytest.raises(ConfigError):
            place(run, smaller)


def layouts(num_layers: int) -> list[tuple[int, int]]:
    """Every (p, v) of an interleaved pipeline of that many blocks."""
    return [(p, v) for p in range(2, num_layers + 1) for v in range(2, num_layers + 1) if num_layers % (p * v) == 0]


@pytest.mark.parametrize("num_layers", [24, 32])
def test_stage_of_layer_deals_out_chunks_in_turn(num_layers: int) -> None:
    for pp, vpp in [(1, 1), (2, 1), (num_layers, 1), *layouts(num_layers)]:
        chunk = num_layers // (pp * vpp)
        # Virtual stage after virtual stage, every pipeline stage takes the next blocks.
        stages = [stage for _ in range(vpp) for stage in range(pp) for _ in range(chunk)]
        assert [stage_of_layer(layer, num_layers=num_layers, pp=pp, vpp=vpp) for layer in range(num_layers)] == stages


@pytest.mark.parametrize(
    ("num_layers", "layers", "together"),
    [
        (24, (4, 12, 20), {(2, 3), (4, 3), (8, 3), (2, 6), (4, 6), (2, 12)}),
        (32, (8, 16, 24), {(2, 4), (4, 4), (8, 4), (2, 8), (4, 8), (2, 16)}),
        (32, (7, 15, 23), {(2, 4), (4, 4), (8, 4), (2, 8), (4, 8), (2, 16)}),
    ],
)
def test_memory_layers_share_a_stage_in_the_layouts_of_the_design(
    num_layers: int, layers: tuple[int, ...], together: set[tuple[int, int]]
) -> None:
    found = set()
    for pp, vpp in layouts(num_layers):
        stages = {stage_of_layer(layer, num_layers=num_layers, pp=pp, vpp=vpp) for layer in layers}
        run = RunConfig(
            model=replace(MODEL, num_layers=num_layers),
            memory=replace(MEMORY, layers=layers),
            parallel=ParallelConfig(pp=pp, vpp=vpp),
            train=TrainConfig(global_batch_size=pp, seq_length=32),
        )
        placement = place(run, pp)
        assert placement.table_stages == tuple(sorted(stages))
        if len(stages) == 1:
            found.add((pp, vpp))
            assert f"table on stage {min(stages)} of {pp}" in placement.reason
        else:
            assert f"stages {', '.join(map(str, sorted(stages)))}" in placement.reason
            assert f"pp={pp}, vpp={vpp}" in placement.reason
    assert found == together


def shards(placement: Placement) -> tuple[int, int]:
    plan = placement.memories["memory"].plan
    return plan.num_row_shards, plan.num_column_shards


def test_place_cuts_columns_or_rows_by_the_bytes_they_send() -> None:
    # 2 D b = 512 against (e + s) M = 96 bytes: columns; with 48 reads 576: rows.
    columns = place(BASE.with_parallel(mp=4), 4)
    assert shards(columns) == (1, 4)
    assert (columns.grid.mp_rows, columns.grid.mp_columns) == (1, 4)
    assert "4 column shards" in columns.reason and "D=64, M=8" in columns.reason
    many_reads = replace(BASE, memory=replace(MEMORY, heads=12))
    rows = place(many_reads.with_parallel(mp=4), 4)
    assert shards(rows) == (4, 1)
    assert "4 row shards" in rows.reason and "M=48" in rows.reason
    wide_tiles = replace(BASE, memory=replace(MEMORY, column_tile=32))
    rows = place(wide_tiles.with_parallel(mp=4), 4)
    assert shards(rows) == (4, 1)
    assert "only 2 column tiles" in rows.reason
    grid = place(BASE.with_parallel(mp=4, mp_rows=2), 8)
    assert (*shards(grid), grid.grid.dp) == (2, 2, 8)
    assert grid.reason.endswith("2 row x 2 column shards as set, one hop")
    two_hops = place(BASE.with_parallel(mp=4, mp_rows=2, mp_hops=2), 8)
    assert two_hops.grid.mp_hops == 2
    assert two_hops.reason.endswith("2 row x 2 column shards as set, two hops")
    plan = grid.memories["memory"].plan
    assert (plan.num_slots, plan.value_dim, plan.column_tile) == (64, 64, 8)


@pytest.mark.parametrize(
    ("sizes", "setting", "width", "merge", "words"),
    [
        # Three heads that read 4 of 16 slots each are expected to read 16 (1 - (3/4)^3) = 9.25 with 12 reads.
        ({"mp": 4, "mp_rows": 2}, "auto", 128, True, "; duplicate reads (23% expected) merged"),
        ({"mp": 4, "mp_rows": 2}, "auto", 64, False, ""),
        ({"mp": 4, "mp_rows": 1}, "auto", 128, False, ""),
        ({"mp": 4, "mp_rows": 1}, "on", 64, True, "; duplicate reads merged as set"),
        ({"mp": 4, "mp_rows": 2}, "off", 128, False, ""),
        ({"mp": 1}, "on", 128, False, ""),
    ],
)
def test_place_merges_duplicates_where_it_pays_or_is_asked_for(
    sizes: dict[str, int], setting: str, width: int, merge: bool, words: str
) -> None:
    memory = replace(MEMORY, num_subkeys=4, value_dim=width, merge_duplicates=setting, heads=3)
    (memory,) = place(replace(BASE, memory=memory).with_parallel(**sizes), 4).memories.values()
    assert memory.merge == merge
    assert ("merged" in memory.reason) == merge and memory.reason.endswith(words)


def test_place_of_a_dense_model_has_no_table() -> None:
    dense = replace(BASE, memory=MemoryConfig(enabled=False))
    placement = place(dense, 2)
    assert placement.memories == {} and placement.table_stages == ()
    with pytest.raises(ConfigError, match=r"parallel\.mp=2 with memory\.enabled=false"):
        place(dense.with_parallel(mp=2), 2)


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"tp": 2, "pp": 2}, 6, r"6 ranks .*tp=2 x cp=1 x pp=2 = 4"),
        ({"mp": 4}, 6, r"parallel\.mp=4 .*= 6 on 6 ranks"),
        ({"mp": 16, "mp_rows": 1}, 16, r"16 column shards .* 64 wide has 8 of memory\.column_tile=8"),
    ],
)
def test_place_refuses_what_does_not_divide(sizes: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(BASE.with_parallel(**sizes), world)


@pytest.mark.parametrize(
    ("sizes", "batch", "world", "padding"),
    [
        ({}, (48, 1), 6, 0),
        ({}, (48, 1), 5, 2),
        ({"tp": 2}, (48, 8), 8, 16),
        ({"pp": 4, "vpp": 3}, (48, 1), 32, 16),
        ({"pp": 4}, (48, 1), 32, 0),
    ],
)
def test_place_tells_the_padding(sizes: dict[str, int], batch: tuple[int, int], world: int, padding: int) -> None:
    train = TrainConfig(global_batch_size=batch[0], micro_batch_size=batch[1], seq_length=32)
    reason = place(replace(BASE, train=train).with_parallel(**sizes), world).reason
    assert ("padding a step" in reason) == bool(padding)
    assert not padding or f"; {padding} samples of padding a step" in reason


@pytest.mark.parametrize(
    ("parallel", "world", "samples", "expected"),
    [
        ({}, 1, 24, 8),
        ({"mp": 4}, 4, 24, 6),
        ({"pp": 2}, 2, 24, 6),
        ({"pp": 2, "vpp": 2}, 4, 24, 3),
        ({"tp": 2}, 2, 24, 8),
        ({"mp": 24}, 24, 24, 1),
        # Padding that single samples need too: 5 = 3 + 2 over two ranks.
        ({}, 2, 5, 3),
        ({}, 1, 5, 5),
        ({"pp": 2}, 2, 3, 1),
    ],
)
def test_micro_batch_chosen_by_layout(parallel: dict[str, int], world: int, samples: int, expected: int) -> None:
    train = TrainConfig(global_batch_size=samples, micro_batch_size=0, seq_length=128)
    run = RunConfig(model=MODEL, memory=MEMORY, train=train, parallel=ParallelConfig(**parallel))
    resolved = resolve(run, world)
    assert resolved.train.micro_batch_size == expected
    place(resolved, world)


def test_micro_batch_and_virtual_stages_kept_when_set() -> None:
    run = RunConfig(model=MODEL, train=TrainConfig(global_batch_size=24, micro_batch_size=2))
    assert resolve(run, 1) is run


def test_memories_are_placed_apart_on_one_grid() -> None:
    run = replace(BASE, more_memories=(replace(MEMORY, layers=(2, 3), num_subkeys=5, variant="peer"),))
    placement = place(run.with_parallel(pp=2, mp=2, mp_rows=2), 4)
    first, second = placement.memories.values()
    assert (first.stages, second.stages) == ((0, 1), (0,))
    assert (first.plan.num_slots, second.plan.num_slots) == (64, 25)
    assert placement.table_stages == (0, 1)
    assert "memory: a copy" in placement.reason and "memory1: table on stage 0" in placement.reason


@pytest.mark.parametrize(
    ("num_layers", "layers", "expected"),
    [
        # (4, 12, 20) of 24 never meet at p = 3, and (8, 16, 24) of 32 meet at multiples of four chunks a stage.
        (24, (4, 12, 20), {1: 1, 2: 3, 3: None, 4: 3, 6: None, 8: 3, 12: None}),
        (32, (8, 16, 24), {1: 1, 2: 4, 4: 4, 8: 4, 16: None}),
        (24, (4, 5), {2: 1, 4: 1, 12: 1, 24: None}),
        (24, (7,), {2: 1, 24: 1}),
    ],
)
def test_fewest_virtual_stages_that_put_the_table_on_one_stage(
    num_layers: int, layers: tuple[int, ...], expected: dict[int, int | None]
) -> None:
    assert {pp: colocating_vpp([layers], num_layers=num_layers, pp=pp) for pp in expected} == expected
    for pp, vpp in expected.items():
        run = RunConfig(
            model=replace(MODEL, num_layers=num_layers),
            memory=replace(MEMORY, layers=layers),
            parallel=ParallelConfig(pp=pp, vpp=0),
            train=TrainConfig(global_batch_size=2 * pp, seq_length=32),
        )
        resolved = resolve(run, pp)
        assert resolved == run.with_parallel(vpp=vpp or 1)
        placement = place(resolved, pp)
        assert (len(placement.table_stages) == 1) == (vpp is not None)
        if pp > 1:
            assert ("where all its layers lie" if vpp else "nor at any vpp") in placement.reason


def test_virtual_stages_are_not_chosen_at_the_price_of_padding() -> None:
    # Three micro-batches: interleaved over two stages they would be four.
    train = TrainConfig(global_batch_size=3, seq_length=32)
    run = replace(BASE, train=train).with_parallel(pp=2, vpp=0)
    resolved = resolve(run, 2)
    assert resolved.parallel.vpp == 1
    reason = place(resolved, 2).reason
    assert "a copy of the table on each of the stages 0, 1" in reason
    assert "they would at parallel.vpp=3, with 1 samples of padding" in reason
    even = resolve(replace(run, train=TrainConfig(global_batch_size=4, seq_length=32)), 2)
    assert even.parallel.vpp == 3
    dense = resolve(replace(run, memory=MemoryConfig(enabled=False)), 2)
    assert dense.parallel.vpp == 1
