"""Where reads go: Zipf's law, replayed traces, and what skewed exchanges cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempar.parallel.collective_time import all_to_all_us
from mempar.parallel.exchange_time import exchange_calls
from mempar.parallel.links import Link, Topology
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.estimate.layout import Layout
from mempar.tools.simulate.exchange_load import ExchangeLoad
from mempar.tools.simulate.loads import ZipfLoads, inclusion, token_counts
from toy import VOCAB, toy_run

TOPOLOGY = Topology(
    inside=Link(latency_us=2.0, gb_per_s=100.0),
    across=Link(latency_us=9.0, gb_per_s=12.5),
    ranks_per_node=4,
    node_gb_per_s=30.0,
)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize(("num_slots", "top_k"), [(100, 4), (100, 100), (200_000, 32), (16_000_000, 32)])
def test_distinct_choices_follow_the_law(exponent: float, num_slots: int, top_k: int):
    probability, rest = inclusion(exponent, num_slots, top_k)
    assert probability.sum() + rest == pytest.approx(top_k)
    assert (probability <= 1.0).all() and (np.diff(probability) <= 1e-15).all() and rest >= 0.0
    below = probability[probability < 1.0]
    if exponent and len(below) > 1:
        # What is not always chosen is chosen in proportion to r^-a.
        first = len(probability) - len(below) + 1
        expected = ((first + 1) / first) ** -exponent
        assert below[1] / below[0] == pytest.approx(expected)
    if not exponent:
        assert probability == pytest.approx(top_k / num_slots)


def test_reads_are_all_dealt_out_and_repeat_with_the_seed():
    layout = Layout.of(toy_run(mp=4, mp_rows=4, micro_batches=3, global_batch_size=23), 8, VOCAB)
    loads, again, other = (ZipfLoads(layout, 1.1, seed) for seed in (3, 3, 4))
    memory = layout.run.memory
    for micro_batch in range(layout.batch.num_micro_batches):
        entries = loads.entries(1, micro_batch)
        assert entries.shape == (8, 4)
        assert (entries.sum(1) == token_counts(layout, micro_batch) * memory.heads * memory.top_k).all()
        assert (entries == again.entries(1, micro_batch)).all()
    assert (loads.entries(1, 0) != other.entries(1, 0)).any()
    assert loads.shares(1) != pytest.approx(loads.shares(2))


def test_token_counts_add_up_to_the_batch():
    layout = Layout.of(toy_run(tp=2, mp=2, micro_batches=2, global_batch_size=11), 6, VOCAB)
    total = sum(token_counts(layout, place).sum() for place in range(layout.batch.num_micro_batches))
    assert total == 11 * layout.run.train.seq_length


def test_favourites_are_slots_of_their_own():
    # All 144 slots are somebody's favourites, and equally popular: every row shard has its quarter of them.
    layout = Layout.of(toy_run(mp=4, mp_rows=4), 4, VOCAB)
    assert ZipfLoads(layout, 0.0, 3).shares(1) == pytest.approx(np.full(4, 0.25))


def test_skew_grows_with_the_exponent():
    run = toy_run(mp=4, mp_rows=4)
    layout = Layout.of(replace(run, memory=replace(run.memory, num_subkeys=512)), 4, VOCAB)
    spread = [
        np.ptp(np.mean([ZipfLoads(layout, a, 5).shares(block) for block in (1, 2, 3)], 0)) for a in (0.0, 0.8, 1.2)
    ]
    assert spread[0] < spread[1] < 0.05 < spread[2]


@settings(max_examples=80, deadline=None)
@given(
    grid=st.sampled_from([(2, 1), (4, 1), (8, 1), (1, 4), (2, 2), (4, 2), (3, 1), (3, 2), (2, 3)]),
    groups=st.integers(1, 3),
    first_node=st.integers(0, 3),
    most=st.sampled_from([0, 1, 40]),
    seed=st.integers(0, 2**16),
)
def test_skewed_exchange_costs_what_its_pairs_do(
    grid: tuple[int, int], groups: int, first_node: int, most: int, seed: int
):
    rows, columns = grid
    plan = ShardPlan(num_slots=96, value_dim=24, column_tile=4, num_row_shards=rows, num_column_shards=columns)
    size, value_bytes = plan.num_shards, 2
    entries = np.random.default_rng(seed).integers(0, most + 1, (groups * size, rows))
    first_rank = first_node * groups * size
    load = ExchangeLoad(entries, plan, TOPOLOGY, first_rank)
    for group in range(groups):
        mine = entries[group * size : (group + 1) * size]
        members = range(first_rank + group * size, first_rank + (group + 1) * size)
        calls = exchange_calls(plan, mine.tolist(), [0] * size, reads=8, value_bytes=value_bytes)
        weights, scores = calls[-4], calls[-1]
        assert (weights.phase, scores.phase) == ("entries", "score_grads")
        for call in (weights, scores):
            expected = all_to_all_us(TOPOLOGY, members, call.sent_bytes) if size > 1 else 0.0
            assert load.busiest.us(TOPOLOGY, value_bytes)[group] == pytest.approx(expected)
        received = [sum(mine[q][p % rows] for q in range(size)) for p in range(size)]
        assert load.received[group * size : (group + 1) * size].tolist() == received
