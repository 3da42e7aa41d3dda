"""Parts of logical tensors: row blocks, overlaps, coverage (mempar.runtime.checkpoint.boxes)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempar.errors import MemparError
from mempar.runtime.checkpoint.boxes import Box, check_cover, check_coverage, row_blocks


def box(offset: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...] = (10, 6), name: str = "x") -> Box:
    return Box(name=name, dtype="float32", shape=shape, offset=offset, sizes=sizes)


def grid(rows: list[int], columns: list[int]) -> list[Box]:
    """All boxes between cuts of a tensor [10, 6]."""
    return [
        box((top, left), (bottom - top, right - left))
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


@given(start=st.integers(0, 30), size=st.integers(1, 30), rows=st.integers(1, 12))
def test_row_blocks_end_at_the_same_rows_wherever_the_box_begins(start: int, size: int, rows: int) -> None:
    whole = box((start, 2), (size, 3), (60, 6))
    blocks = list(row_blocks(whole, rows))
    cuts = [block.offset[0] for block in blocks] + [blocks[-1].offset[0] + blocks[-1].sizes[0]]
    assert (cuts[0], cuts[-1]) == (start, start + size)
    assert all(cut % rows == 0 for cut in cuts[1:-1])
    assert all(0 < block.sizes[0] <= rows and (block.offset[1], block.sizes[1]) == (2, 3) for block in blocks)


def test_a_number_alone_is_one_block() -> None:
    single = box((), (), ())
    assert list(row_blocks(single, 1)) == [single]
    check_coverage([(single, 0)])


@settings(deadline=None)
@given(data=st.data())
def test_overlap_is_where_both_boxes_are(data: st.DataObject) -> None:
    def draw() -> Box:
        offset = tuple(data.draw(st.integers(0, size - 1)) for size in (10, 6))
        sizes = tuple(data.draw(st.integers(1, size - at)) for size, at in zip((10, 6), offset, strict=True))
        return box(offset, sizes)

    def painted(one: Box) -> np.ndarray:
        whole = np.zeros((10, 6), dtype=bool)
        whole[tuple(slice(at, at + size) for at, size in zip(one.offset, one.sizes, strict=True))] = True
        return whole

    one, other = draw(), draw()
    both = painted(one) & painted(other)
    places = one.overlap(other)
    if places is None:
        assert not both.any()
        return
    for part, place in zip((one, other), places, strict=True):
        whole = np.zeros((10, 6), dtype=bool)
        inside = whole[tuple(slice(at, at + size) for at, size in zip(part.offset, part.sizes, strict=True))]
        inside[place] = True
        assert (whole == both).all()


def test_any_cut_into_parts_covers() -> None:
    check_coverage([(part, rank) for rank, part in enumerate(grid([0, 3, 4, 10], [0, 5, 6]))])
    # Cuts need not meet: rows are cut differently in the two halves.
    uneven = [box((0, 0), (7, 3)), box((7, 0), (3, 3)), box((0, 3), (2, 3)), box((2, 3), (8, 3))]
    check_coverage([(part, 0) for part in uneven] + [(box((0,), (4,), (4,), "y"), 1)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts: parts[:-1], r"no rank holds element \[4, 5\] of x \[10, 6\]"),
        (lambda parts: [*parts, parts[1]], r"element \[0, 5\] of x \[10, 6\] would be written by ranks \[1, 6\]"),
        (lambda parts: [*parts, box((9, 5), (1, 1))], r"element \[9, 5\].* by ranks \[5, 6\]"),
        (lambda parts: [*parts[:-1], replace(parts[-1], sizes=(7, 1))], "leave its shape"),
        (lambda parts: [*parts[:-1], replace(parts[-1], shape=(11, 6))], "ranks disagree about x"),
        (lambda parts: [*parts[:-1], replace(parts[-1], dtype="bfloat16")], "ranks disagree about x"),
    ],
)
def test_holes_and_overlaps_are_named(change, said: str) -> None:  # type: ignore[no-untyped-def]
    parts = grid([0, 3, 4, 10], [0, 5, 6])
    with pytest.raises(MemparError, match=said):
        check_coverage([(part, rank) for rank, part in enumerate(change(parts))])


def test_pieces_of_a_manifest_make_up_a_tensor_or_not() -> None:
    parts = grid([0, 3, 4, 10], [0, 5, 6])
    check_cover("x", (10, 6), parts[::-1])
    check_cover("x", (10, 6), [box((0, 0), (7, 3)), box((7, 0), (3, 3)), box((0, 3), (2, 3)), box((2, 3), (8, 3))])
    check_cover("x", (), [box((), (), ())])
    with pytest.raises(ValueError, match="do not make up its shape"):
        check_cover("x", (10, 6), parts[1:])
    # As many elements as the whole, some of them twice.
    with pytest.raises(ValueError, match="pieces of x overlap"):
        check_cover("x", (10, 6), [box((0, 0), (5, 6)), box((4, 0), (5, 6))])
    with pytest.raises(ValueError, match="pieces of x overlap"):
        check_cover("x", (4,), [box((0,), (2,), (4,)), box((1,), (2,), (4,))])
