"""Closed forms of what is sent, against counting by hand."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch

from mempar.parallel.cost import (
    columns_send_fewer_bytes,
    duplicate_share,
    exchange_bytes,
    forward_bytes_across,
    merging_pays,
)
from mempar.parallel.shard_plan import ShardPlan
from thread_groups import owned_entries, plan_of

pytestmark = pytest.mark.usefixtures("rng")


def brute_force_bytes(
    plan: ShardPlan, slots: list[list[list[int]]], *, reads: int, value_bytes: int, known: bool, hops: int, merged: bool
) -> list[dict[str, int]]:
    """Counts, for every member, what the protocol makes it send: entry by entry, sum by sum."""
    num_rows, num_columns = plan.num_row_shards, plan.num_column_shards
    tiles = torch.arange(plan.value_dim).split(plan.column_tile)
    columns = [sum(len(tiles[i]) for i in part) for part in torch.arange(len(tiles)).tensor_split(num_columns)]
    owner = {int(s): i for i, part in enumerate(torch.arange(plan.num_slots).tensor_split(num_rows)) for s in part}
    if merged:
        slots = [[sorted(set(token)) for token in tokens] for tokens in slots]
    counted = num_rows > 1 or merged
    sent = [Counter() for _ in slots]
    for sender, receiver in itertools.permutations(range(len(slots)), 2):
        # A count of entries where they are not fixed; a count of tokens where it is not known.
        sent[sender]["split_sizes"] += 8 * counted + 8 * (not known)
        for token in slots[sender]:
            # The receiver learns how many of the token's entries are its own, and gets these.
            sent[sender]["entries"] += (1 if reads <= 255 else 2) * counted
            for slot in token:
                sent[sender]["entries"] += (4 + value_bytes) * (owner[slot] == receiver % num_rows)
        for token in slots[receiver]:
            # The sender answers in backward with a gradient for each entry that it got.
            sent[sender]["score_grads"] += sum(owner[slot] == sender % num_rows for slot in token) * value_bytes
    for phase, sender, receiver, column in slices_sent(num_rows, num_columns, [len(tokens) for tokens in slots], hops):
        if sender != receiver:
            sent[sender][phase] += columns[column] * value_bytes
    return [dict(counter) for counter in sent]


def slices_sent(num_rows: int, num_columns: int, tokens: list[int], hops: int) -> Iterator[tuple[str, int, int, int]]:
    """(phase, sender, receiver, column shard) of each token's slice that is sent; some to the sender itself."""
    for reader, count in enumerate(tokens):
        # The ranks that have, for each column shard, the reader's row coordinate.
        row, at_home = reader % num_rows, reader // num_rows
        for _, column in itertools.product(range(count), range(num_columns)):
            meeting = column * num_rows + row
            for owner in range(column * num_rows, (column + 1) * num_rows):
                if hops == 1:
                    yield "values", owner, reader, column
                    yield "output_grads", reader, owner, column
                else:
                    yield "values_inside", owner, meeting, column
                    yield "output_grads_inside", meeting, owner, column
            if hops == 2 and column != at_home:
                yield "values_across", meeting, reader, column
                yield "output_grads_across", reader, meeting, column


def test_exchange_bytes_match_brute_force_on_random_grids(rng: random.Random) -> None:
    for _ in range(400):
        hops, merged = rng.choice([1, 2]), rng.random() < 0.5
        num_rows, num_columns = rng.randint(hops, 4), rng.randint(hops, 4)
        tile, num_slots = rng.randint(1, 3), rng.randint(num_rows, 20)
        value_dim = rng.randint(tile * (num_columns - 1) + 1, tile * num_columns + 7)
        plan = plan_of(num_rows, num_columns, num_slots, value_dim, tile)
        reads, value_bytes, known = rng.choice([1, 2, 5, 255, 256]), rng.choice([2, 4, 8]), rng.random() < 0.5
        counts = [rng.choice([0, 1, 2, 3] if reads < 255 else [0, 1]) for _ in range(plan.num_shards)]
        counts[rng.randrange(plan.num_shards)] += 1
        slots = [[[rng.randrange(num_slots) for _ in range(reads)] for _ in range(count)] for count in counts]
        tensors = [torch.tensor(tokens, dtype=torch.int64).view(-1, reads) for tokens in slots]
        owned = owned_entries(plan, tensors, merged=merged)
        ways = {"reads": reads, "value_bytes": value_bytes, "hops": hops, "merged": merged}
        expected = brute_force_bytes(plan, slots, known=known, **ways)
        for rank in range(plan.num_shards):
            predicted = asdict(exchange_bytes(plan, rank, owned, counts, tokens_known=known, **ways))
            assert predicted == {phase: expected[rank].get(phase, 0) for phase in predicted}
            assert set(expected[rank]) <= set(predicted)


def test_two_hops_cut_cross_node_bytes_as_designed() -> None:
    # Eight nodes of eight ranks, rows inside a node; 4 heads x 32 rows, 4096 columns in bf16; KB a token.
    plan = plan_of(8, 8, 1024**2, 4096, 128)
    across = {hops: forward_bytes_across(plan, 0, reads=128, value_bytes=2, hops=hops) for hops in (1, 2)}
    assert [round(across[hops] / 1000, 1) for hops in (1, 2)] == [62.7, 12.5]


def test_bytes_across_are_what_the_phases_send_to_other_column_shards(rng: random.Random) -> None:
    for _ in range(50):
        num_rows, num_columns, reads = rng.randint(2, 4), rng.randint(2, 4), rng.randint(1, 5)
        plan = plan_of(num_rows, num_columns, num_slots=30, value_dim=rng.randint(8, 20))
        rank, tokens = rng.randrange(plan.num_shards), rng.randint(1, 3)
        counts = [tokens] * plan.num_shards
        # Every rank's entries lie in one row shard: the totals do not depend on which.
        owned = [[tokens * reads, *[0] * (num_rows - 1)] for _ in counts]
        for hops in (1, 2):
            given = {"reads": reads, "value_bytes": 4, "hops": hops}
            phases = exchange_bytes(plan, rank, owned, counts, **given)
            # Of what is sent in one hop, the other ranks of the same column shard get their tokens' sums.
            width = plan.columns_of(rank)[1] - plan.columns_of(rank)[0]
            values = phases.values_across if hops == 2 else phases.values - 4 * width * tokens * (num_rows - 1)
            entries = 8 * tokens * reads * (num_columns - 1)
            across = forward_bytes_across(plan, rank, reads=reads, value_bytes=4, hops=hops)
            assert tokens * across == entries + values


@pytest.mark.parametrize(("heads", "top_k", "num_slots"), [(1, 5, 9), (2, 4, 12), (4, 8, 50), (3, 6, 6)])
def test_duplicate_share_is_the_mean_of_even_independent_heads(heads: int, top_k: int, num_slots: int) -> None:
    draw = np.random.default_rng(5)
    num_tokens = 4000
    slots = draw.random((num_tokens, heads, num_slots)).argsort(-1)[..., :top_k].reshape(num_tokens, -1)
    shares = [1 - len(set(token.tolist())) / (heads * top_k) for token in slots]
    share = duplicate_share(heads=heads, top_k=top_k, num_slots=num_slots)
    # Five standard errors.
    assert abs(share - np.mean(shares)) <= 5 * np.std(shares) / num_tokens**0.5 + 1e-12
    assert duplicate_share(heads=4, top_k=32, num_slots=2**20) == pytest.approx(3 * 32 / 2 / 2**20, rel=1e-3)


def test_merging_pays_for_small_wide_tables_in_several_row_shards() -> None:
    small = {"heads": 4, "top_k": 32, "num_slots": 32**2}
    assert duplicate_share(**small) == pytest.approx(0.0455, abs=1e-3)
    assert merging_pays(**small, value_dim=1024, num_row_shards=2)
    assert not merging_pays(**small, value_dim=256, num_row_shards=2)
    assert not merging_pays(**small, value_dim=1024, num_row_shards=1)
    assert not merging_pays(heads=4, top_k=32, num_slots=1024**2, value_dim=4096, num_row_shards=8)


def test_columns_send_fewer_bytes_agrees_with_the_sum_of_formulas(rng: random.Random) -> None:
    answers = set()
    for _ in range(300):
        size, num_tokens = rng.randint(2, 6), rng.randint(1, 4)
        value_dim, reads = size * rng.randint(1, 40), size * rng.randint(1, 40)
        value_bytes = rng.choice([2, 4, 8])
        totals = {}
        for shards in ((size, 1), (1, size)):
            plan = plan_of(*shards, num_slots=size, value_dim=value_dim, tile=1)
            # Slots are spread evenly, so that a row shard owns an equal part of every rank's entries.
            owned = [[num_tokens * reads // shards[0]] * shards[0] for _ in range(size)]
            given = {"reads": reads, "value_bytes": value_bytes}
            phases = asdict(exchange_bytes(plan, 0, owned, [num_tokens] * size, **given))
            # The rule leaves out what rows say about sizes and counts, a byte or so a token.
            counts = 0 if shards[0] == 1 else (1 + (reads > 255)) * num_tokens * (size - 1)
            totals[shards] = sum(phases.values()) - phases["split_sizes"] - counts
        answer = columns_send_fewer_bytes(value_dim=value_dim, reads=reads, value_bytes=value_bytes)
        assert answer == (totals[1, size] < totals[size, 1])
        answers.add(answer)
    assert answers == {True, False}
