"""Digests that do not depend on how a tensor is cut, and the mixing function they share with initial values."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempar.kernels.hashing import GOLDEN_GAMMA, mix, name_key, shift_right
from mempar.memory import digest as digest_module
from mempar.memory.digest import digest, digest_bands, digest_box

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.uint8)
WIDE = (1 << 64) - 1


def table(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    numbers = torch.randn(rows, columns, dtype=torch.float64)
    return numbers.to(dtype) if dtype.is_floating_point else (numbers * 50).abs().to(dtype)


def by_hand(name: str, whole: Tensor) -> int:
    """The sum of the elements' bits times their keys, element by element, in Python's integers."""

    def odd_key(number: int) -> int:
        number &= WIDE
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & WIDE
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB & WIDE
        return (number ^ (number >> 31)) | 1

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    bits = whole.view(sizes[whole.element_size()]).tolist()
    key = int(name_key(name))
    total = 0
    for row, column in itertools.product(range(len(bits)), range(len(bits[0]))):
        total += bits[row][column] * odd_key(row * GOLDEN_GAMMA + key) * odd_key(column * GOLDEN_GAMMA)
    return total & WIDE


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0, as its authors' C code prints them.
    state = torch.arange(1, 4) * GOLDEN_GAMMA
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number & WIDE for number in mix(state).tolist()] == expected
    assert shift_right(torch.tensor([-1]), 60).tolist() == [15]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digest_is_the_sum_over_elements(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "_CHUNK_ELEMENTS", 17)
    whole = table(11, 7, dtype)
    before = whole.clone()
    assert int(digest("memory.values", whole)) & WIDE == by_hand("memory.values", before)
    assert torch.equal(whole, before)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 23),
    columns=st.integers(1, 19),
    row_cuts=st.lists(st.integers(0, 23), max_size=4),
    column_cuts=st.lists(st.integers(0, 19), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_digests_of_the_pieces_of_any_cut_add_up(
    rows: int, columns: int, row_cuts: list[int], column_cuts: list[int], dtype: torch.dtype
) -> None:
    whole = table(rows, columns, dtype)
    row_bounds = sorted({0, rows, *(min(cut, rows) for cut in row_cuts)})
    column_bounds = sorted({0, columns, *(min(cut, columns) for cut in column_cuts)})
    pieces = [
        digest("x", whole[top:bottom, left:right], top, left)
        for top, bottom in itertools.pairwise(row_bounds)
        for left, right in itertools.pairwise(column_bounds)
    ]
    assert torch.equal(sum(pieces, torch.zeros((), dtype=torch.int64)), digest("x", whole))
    assert torch.equal(digest_bands("x", whole, 0, 0, row_bounds).sum(), digest("x", whole))


def test_digest_depends_on_name_place_and_every_bit() -> None:
    whole = table(6, 5, torch.float32)
    found = {
        int(digest("x", whole)),
        int(digest("y", whole)),
        int(digest("x", whole, 1)),
        int(digest("x", whole, 0, 1)),
    }
    found |= {int(digest("x", whole.flip(0))), int(digest("x", whole.flip(1)))}
    changes = 0
    for element in range(whole.numel()):
        for bit in (0, 13, 31):
            changed = whole.clone()
            changed.view(torch.int32).view(-1)[element] ^= 1 << bit if bit < 31 else -(1 << 31)
            found.add(int(digest("x", changed)))
            changes += 1
    assert len(found) == 6 + changes
    # A sign is a bit.
    assert digest("x", torch.zeros(1, 1)) != digest("x", -torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_digest_sees_changes_that_go_in_pairs(dtype: torch.dtype) -> None:
    # Distinct numbers, so that an exchange is a change.
    numbers = torch.arange(16000, 16000 + 40 * 24, dtype=torch.int16).view(torch.bfloat16)
    whole = numbers.view(40, 24).to(dtype)
    pairs: set[frozenset[int]] = set()
    found = {int(digest("x", whole))}
    for _ in range(200):
        changed = whole.clone().view(-1)
        one, other = torch.randperm(whole.numel())[:2].tolist()
        pairs.add(frozenset((one, other)))
        changed[one], changed[other] = -changed[one], -changed[other]
        found.add(int(digest("x", changed.view_as(whole))))
        changed[one], changed[other] = -changed[other], -changed[one]
        found.add(int(digest("x", changed.view_as(whole))))
    # A pair may be drawn twice.
    assert len(found) == 1 + 2 * len(pairs)


def test_digest_of_boxes_of_more_dimensions_is_that_of_their_rows() -> None:
    whole = torch.randn(3, 5, 4, 6)
    flat = digest("x", whole.view(-1, 6))
    assert torch.equal(digest_box("x", whole, (0, 0, 0, 0), (3, 5, 4, 6)), flat)
    boxes = [((1, 2, 0, 0), whole[1:, 2:]), ((0, 0, 0, 0), whole[:1]), ((1, 0, 0, 0), whole[1:, :2, :, :5])]
    boxes += [((1, 0, 0, 5), whole[1:, :2, :, 5:])]
    total = sum((digest_box("x", box, at, (3, 5, 4, 6)) for at, box in boxes), torch.zeros((), dtype=torch.int64))
    assert torch.equal(total, flat)
    assert torch.equal(digest_box("x", whole[0, 0, 0, 2:], (2,), (6,)), digest("x", whole[0, 0, 0, 2:], 2))
    assert digest_box("x", torch.tensor(3.0), (), ()) == digest("x", torch.tensor([3.0]))


def test_digest_of_numbers_a_row_is_that_of_one_column() -> None:
    numbers = torch.randn(9)
    assert torch.equal(digest("x", numbers), digest("x", numbers[:, None]))
    assert torch.equal(digest("x", torch.empty(0, 4)), torch.zeros((), dtype=torch.int64))


def test_bands_show_the_rows_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "_CHUNK_ELEMENTS", 12)
    whole = table(20, 4, torch.float32)
    changed = whole.clone()
    changed[13, 2] += 1.0
    cuts = [5, 9, 13, 14, 20]
    before, after = (digest_bands("x", block, 100, 8, cuts) for block in (whole, changed))
    assert (before != after).tolist() == [False, False, True, False]
    assert torch.equal(before[1], digest("x", whole[9:13], 109, 8))
