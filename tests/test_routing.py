"""Entries: merging the reads of a token, and bucketing by the row shard that owns them."""

import itertools
import random
from collections import defaultdict

import pytest
import torch

from mempar.kernels.dispatch import TORCH
from mempar.parallel.merging import merge_reads
from mempar.parallel.routing import count_dtype, route


@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize(("num_tokens", "reads"), [(0, 4), (1, 1), (5, 6), (2, 255), (2, 256)])
def test_route_matches_brute_force(
    rng: random.Random, num_shards: int, num_tokens: int, reads: int, merge: bool
) -> None:
    num_slots = 23
    cuts = [0, *sorted(rng.sample(range(1, num_slots), num_shards - 1)), num_slots]
    slot = torch.randint(num_slots, (num_tokens, reads))
    # The first and last rows of the shards, where a cut could be off by one.
    bounds = torch.tensor([*cuts[:-1], *(cut - 1 for cut in cuts[1:])])
    slot[:, : len(bounds)] = bounds[:reads]
    weight = torch.randn(num_tokens, reads, dtype=torch.float64)
    routed = route(slot, cuts, merge=merge, backend=TORCH)
    score = torch.randn(sum(routed.sizes))
    rows, weights = routed.row_index.split(routed.sizes), routed.to_entries(weight).split(routed.sizes)
    scores, read_scores = score.split(routed.sizes), routed.to_reads(score).view(num_tokens, reads)
    for shard, (start, end) in enumerate(itertools.pairwise(cuts)):
        # (token, row): the reads of an entry; unmerged, every read is one.
        entries: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for token, read in itertools.product(range(num_tokens), range(reads)):
            if start <= slot[token, read] < end:
                row = int(slot[token, read]) - start
                entries[(token, row) if merge else (token, read, row)].append(read)
        expected = sorted(entries)
        assert rows[shard].tolist() == [entry[-1] for entry in expected]
        assert rows[shard].dtype == torch.int32
        for place, entry in enumerate(expected):
            token, same = entry[0], entries[entry]
            assert float(weights[shard][place]) == sum(float(weight[token, read]) for read in same)
            assert {float(read_scores[token, read]) for read in same} == {float(scores[shard][place])}
        if num_shards > 1 or merge:
            counts = [sum(entry[0] == token for entry in expected) for token in range(num_tokens)]
            assert routed.counts is not None
            assert routed.counts[shard].tolist() == counts
            assert routed.counts.dtype == count_dtype(reads)
        else:
            assert routed.counts is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_sums_of_the_reads(rng: random.Random, dtype: torch.dtype) -> None:
    # Heads of distinct slots each, so that a slot has up to four reads of a token.
    slot = torch.stack([torch.cat([torch.randperm(9)[:6] for _ in range(4)]) for _ in range(50)])
    merged = merge_reads(slot, 9, backend=TORCH)
    weight = torch.rand(50, 24).to(dtype)
    assert len(merged.slot_index) < slot.numel() * 0.4
    # Each token's slots once.
    pairs = list(zip(merged.token_index.tolist(), merged.slot_index.tolist(), strict=True))
    assert pairs == sorted({(token, int(index)) for token in range(50) for index in slot[token]})
    dense = torch.zeros(50, 9, dtype=torch.float64).scatter_add_(1, slot, weight.double())
    total = merged.add(weight.flatten())
    assert total.dtype == dtype
    # A sum of at most four weights below one, rounded at each addition.
    expected = torch.stack([dense[pair] for pair in pairs])
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=4 * 4 * torch.finfo(dtype).eps)
    assert torch.equal(merged.add(weight.flatten()), total)


def test_nothing_to_merge_changes_no_number(rng: random.Random) -> None:
    slot = torch.stack([torch.randperm(40)[:8] for _ in range(30)])
    weight = torch.randn(30, 8)
    merged = merge_reads(slot, 40, backend=TORCH)
    order = slot.argsort(1)
    assert torch.equal(merged.slot_index, slot.gather(1, order).flatten())
    assert torch.equal(merged.add(weight.flatten()), weight.gather(1, order).flatten())
    assert torch.equal(merged.spread(merged.add(weight.flatten())), weight.flatten())
