"""Routes of entries to their owners, and packed columns, against their definitions."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bags import DTYPES, WIDTHS, assert_near, every_dtype, every_index_dtype
from mempar.kernels.dispatch import Backend, interpreted
from mempar.kernels.segment_route import Route, count_dtype, native, pack_columns, reference, route, unpack_columns

NUM_SLOTS = 23
every_merge = pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])


def check_route(slot: Tensor, cuts: Sequence[int], merge: bool, backend: Backend) -> Route:
    """Compare a route, and numbers that take it there and back, with its definition."""
    num_tokens, reads = slot.shape
    routed = route(slot, torch.tensor(cuts), merge=merge, backend=backend)
    owners = reference.entries_of(slot, cuts, merge)
    entries = [entry for owner in owners for entry in owner]
    assert routed.sizes == [len(owner) for owner in owners]
    assert routed.row_index.tolist() == [row for _, row, _ in entries]
    assert routed.row_index.dtype == torch.int32
    if len(owners) > 1 or merge:
        counts = [[sum(token == each for token, _, _ in owner) for each in range(num_tokens)] for owner in owners]
        assert routed.counts is not None
        assert routed.counts.tolist() == counts
        assert routed.counts.dtype == count_dtype(reads)
    else:
        assert routed.counts is None
    weight = torch.randn(num_tokens, reads, dtype=torch.float64)
    score = torch.randn(len(entries), dtype=torch.float64)
    # Sums in the order of the reads: the same on every backend, bit for bit.
    expected = [sum(weight[token, same].tolist()) for token, _, same in entries]
    assert routed.to_entries(weight).tolist() == expected
    read_scores = torch.full((num_tokens, reads), torch.nan, dtype=torch.float64)
    for number, (token, _, same) in zip(score.tolist(), entries, strict=True):
        read_scores[token, same] = number
    assert torch.equal(routed.to_reads(score), read_scores.flatten())
    return routed


@every_merge
@every_index_dtype
@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize(("num_tokens", "reads"), [(0, 4), (1, 1), (5, 6)])
def test_route_matches_reference(
    num_shards: int, num_tokens: int, reads: int, index_dtype: torch.dtype, merge: bool, backend: Backend
) -> None:
    check_random_route(num_shards, num_tokens, reads, index_dtype, merge, backend)


@every_merge
@pytest.mark.parametrize(("num_tokens", "reads"), [(70, 15), (2, 255), (2, 256)])
def test_route_of_many_reads_matches_reference(num_tokens: int, reads: int, merge: bool, backend: Backend) -> None:
    check_random_route(3, num_tokens, reads, torch.int64, merge, backend)


def check_random_route(
    num_shards: int, num_tokens: int, reads: int, index_dtype: torch.dtype, merge: bool, backend: Backend
) -> None:
    cuts = [0, *sorted(random.sample(range(1, NUM_SLOTS), num_shards - 1)), NUM_SLOTS]
    slot = torch.randint(NUM_SLOTS, (num_tokens, reads), dtype=index_dtype)
    # The first and last rows of the shards, where a cut could be off by one.
    bounds = torch.tensor([*cuts[:-1], *(cut - 1 for cut in cuts[1:])], dtype=index_dtype)
    slot[:, : len(bounds)] = bounds[:reads]
    check_route(slot, cuts, merge, backend)


@every_merge
def test_route_takes_all_slots_to_one_owner(merge: bool, backend: Backend) -> None:
    slot = torch.full((3, 5), 11)
    routed = check_route(slot, [0, 4, 4, 12, NUM_SLOTS], merge, backend)
    assert routed.sizes == [0, 0, 3 if merge else 15, 0]


@every_merge
def test_route_takes_slots_beyond_32_bits(merge: bool, backend: Backend) -> None:
    cuts = [0, 2**31 - 1, 2**32 - 2, 3 * 2**31 - 3]
    slot = torch.stack([torch.randint(cuts[-1], (6,)) for _ in range(4)])
    slot[1] = torch.tensor([number for start, end in itertools.pairwise(cuts) for number in (start, end - 1)])
    slot[2, 1::2] = slot[2, ::2]
    check_route(slot, cuts, merge, backend)


# Every example is tested with the same backend.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), merge=st.booleans())
def test_route_of_any_small_shape(data: st.DataObject, merge: bool, backend: Backend) -> None:
    cuts = sorted([0, 8, *data.draw(st.lists(st.integers(0, 8), max_size=4))])
    reads = data.draw(st.integers(1, 9))
    slots = data.draw(st.lists(st.lists(st.integers(0, 7), min_size=reads, max_size=reads), max_size=4))
    check_route(torch.tensor(slots, dtype=torch.int64).view(-1, reads), cuts, merge, backend)


@every_dtype
def test_merged_numbers_are_sums_of_the_reads(dtype: torch.dtype, backend: Backend) -> None:
    # Heads of distinct slots each, so that a slot has up to four reads of a token.
    slot = torch.stack([torch.cat([torch.randperm(9)[:6] for _ in range(4)]) for _ in range(20)])
    weight = torch.rand(20, 24).to(dtype)
    routed = route(slot, torch.tensor([0, 9]), merge=True, backend=backend)
    assert sum(routed.sizes) < slot.numel() * 0.4
    dense = torch.zeros(20, 9, dtype=torch.float64).scatter_add_(1, slot, weight.double())
    entries = reference.entries_of(slot, [0, 9], True)[0]
    expected = torch.stack([dense[token, row] for token, row, _ in entries])
    # All weights are positive, and the sums in float32 at least: they are rounded once.
    assert_near(routed.to_entries(weight), expected, expected, dtype, 1)


@every_dtype
def test_parts_of_entries_are_added_in_order(dtype: torch.dtype, backend: Backend) -> None:
    slot = torch.randint(NUM_SLOTS, (7, 5))
    for cuts in ([0, 6, NUM_SLOTS], [0, NUM_SLOTS]):
        routed = route(slot, torch.tensor(cuts), backend=backend)
        parts = torch.randn(3, 35).to(dtype)
        wide = parts.to(torch.promote_types(dtype, torch.float32))
        expected, found = routed.to_reads(wide[0] + wide[1] + wide[2]), routed.to_reads(parts.flatten())
        assert_near(found, expected.double(), expected.double().abs(), dtype, 0)
        # The interpreter rounds to bf16 by cutting off.
        assert dtype == torch.bfloat16 or torch.equal(found, expected)


def test_route_checks_what_it_is_given(backend: Backend, checking: Backend) -> None:
    cuts = torch.tensor([0, 4, 9])
    with pytest.raises(ValueError, match="slot_index is"):
        route(torch.zeros(3), cuts, backend=backend)
    with pytest.raises(ValueError, match="row_cuts is"):
        route(torch.zeros(3, 2, dtype=torch.int64), cuts[:1], backend=backend)
    if backend.is_triton:
        with pytest.raises(ValueError, match="at most 1024 reads a token"):
            route(torch.zeros(1, 1025, dtype=torch.int64), cuts, merge=True, backend=backend)
    with pytest.raises(IndexError, match="holds ids from 0 to 9, but they are 0 to 8"):
        route(torch.tensor([[0, 9]]), cuts, backend=checking)


CUTS = {1: [0, 1], 7: [0, 3, 6, 7], 33: [0, 16, 33], 100: [0, 32, 64, 96, 100]}


@every_dtype
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("copies", [1, 3])
def test_packed_columns_match_reference(num_tokens: int, copies: int, dtype: torch.dtype, backend: Backend) -> None:
    for width in WIDTHS:
        # Rows that do not lie side by side, between others that must not be read.
        wide = torch.full((num_tokens, width + 3), torch.nan, dtype=dtype)
        numbers = wide[:, 1 : width + 1].copy_(torch.randn(num_tokens, width))
        for cuts in (CUTS[width], [0, width]):
            packed = pack_columns(numbers, cuts, copies, backend=backend)
            assert torch.equal(packed, reference.pack_columns(numbers, cuts, copies))


def test_packed_columns_have_any_strides(backend: Backend) -> None:
    # As the gradient of a sum, or of a transposed result.
    for numbers in (torch.randn(1, 1).expand(5, 33), torch.randn(33, 5).T):
        packed = pack_columns(numbers, CUTS[33], 2, backend=backend)
        assert torch.equal(packed, reference.pack_columns(numbers, CUTS[33], 2))


@every_dtype
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_unpacked_columns_match_reference(num_tokens: int, parts: int, dtype: torch.dtype, backend: Backend) -> None:
    for width in WIDTHS:
        for cuts in (CUTS[width], [0, width]):
            pieces = torch.randn(parts * num_tokens * width).to(dtype)
            out = unpack_columns(pieces, cuts, num_tokens, parts, backend=backend)
            wide = pieces.to(torch.promote_types(dtype, torch.float32))
            expected = reference.unpack_columns(wide, cuts, num_tokens, parts)
            assert_near(out, expected.double(), expected.double().abs(), dtype, 0)
            # The interpreter rounds to bf16 by cutting off.
            assert (dtype == torch.bfloat16 and parts > 1) or torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_come_back_as_they_were_packed(dtype: torch.dtype, backend: Backend) -> None:
    numbers = torch.randn(4, 100).to(dtype)
    packed = pack_columns(numbers, CUTS[100], 1, backend=backend)
    assert torch.equal(unpack_columns(packed, CUTS[100], 4, 1, backend=backend), numbers)


def test_columns_must_fit_their_cuts(backend: Backend) -> None:
    with pytest.raises(ValueError, match="as many columns as the cuts"):
        pack_columns(torch.zeros(2, 5), [0, 4], 1, backend=backend)
    with pytest.raises(ValueError, match="2 parts of 3 x 5 numbers"):
        unpack_columns(torch.zeros(29), [0, 5], 3, 2, backend=backend)


# The interpreter rounds to bf16 by cutting off.
ROUNDED_ALIKE = [torch.float32, torch.float64, *([] if interpreted() else [torch.bfloat16])]


@pytest.mark.parametrize("dtype", ROUNDED_ALIKE, ids=str)
def test_sums_agree_with_torch_bit_for_bit(dtype: torch.dtype, backend: Backend) -> None:
    slot = torch.randint(3, (6, 24))
    routed = route(slot, torch.tensor([0, 2, 3]), merge=True, backend=backend)
    weight = torch.randn(6, 24).to(dtype)
    assert routed.read_order is not None and routed.offsets is not None
    expected = native.add_reads(weight.flatten(), routed.read_order, routed.offsets)
    assert torch.equal(routed.to_entries(weight), expected)
