"""Boxes of logical tensors: what a rank holds of a whole, how it is cut into row blocks, what overlaps what.

A box is an offset and sizes, one number a dimension. Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from mempar.errors import MemparError


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a logical tensor.

    Attributes:
        name: of the tensor, the same in every layout.
        dtype: its numbers' type as torch spells it, e.g. `bfloat16`.
        shape: of the whole tensor.
        offset: where the part begins.
        sizes: of the part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the part."""
        return prod(self.sizes)

    def overlap(self, other: "Box") -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where two boxes of one tensor meet: slices of this one and of the other; None where they do not."""
        mine, theirs = [], []
        for start, size, other_start, other_size in zip(
            self.offset, self.sizes, other.offset, other.sizes, strict=True
        ):
            first, end = max(start, other_start), min(start + size, other_start + other_size)
            if first >= end:
                return None
            mine.append(slice(first - start, end - start))
            theirs.append(slice(first - other_start, end - other_start))
        return tuple(mine), tuple(theirs)


def whole_box(name: str, dtype: str, shape: tuple[int, ...]) -> Box:
    """All of a logical tensor."""
    return Box(name=name, dtype=dtype, shape=shape, offset=(0,) * len(shape), sizes=shape)


def row_blocks(box: Box, rows: int) -> Iterator[Box]:
    """Cut a box where the whole tensor's rows (its first dimension) are cut into blocks of `rows`."""
    if not box.shape:
        yield box
        return
    start, end = box.offset[0], box.offset[0] + box.sizes[0]
    while start < end:
        stop = min(end, (start // rows + 1) * rows)
        yield replace(box, offset=(start, *box.offset[1:]), sizes=(stop - start, *box.sizes[1:]))
        start = stop


def check_coverage(boxes: list[tuple[Box, int]]) -> None:
    """Check that the parts of all ranks make up whole tensors: no hole, nothing twice, one shape and dtype.

    Args:
        boxes: the parts that would be written, and the ranks that would write them.

    Raises:
        MemparError: naming the tensor, the place and the ranks.
    """
    of_tensor: dict[str, list[tuple[Box, int]]] = {}
    for box, rank in boxes:
        of_tensor.setdefault(box.name, []).append((box, rank))
    for name, parts in of_tensor.items():
        kinds = sorted({(box.shape, box.dtype) for box, _ in parts})
        if len(kinds) > 1:
            raise _not_covered(f"ranks disagree about {name}: {' or '.join(map(str, kinds))}")
        _check_tensor(name, parts)


def check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Check that boxes make up a whole tensor: nothing twice, no hole.

    Cheaper than `check_coverage` where nobody asks what is wrong, and at most as costly as the boxes are many.

    Raises:
        ValueError: when they do not.
    """
    if sum(box.num_elements for box in boxes) != prod(shape):
        raise ValueError(f"the pieces of {name} do not make up its shape")
    # Boxes that reach into the rows at hand.
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset):
        if box.num_elements:
            row = box.offset[:1]
            active = [other for other in active if not row or other.offset[0] + other.sizes[0] > row[0]]
            if any(box.overlap(other) is not None for other in active):
                raise ValueError(f"pieces of {name} overlap")
            active.append(box)


def _check_tensor(name: str, parts: list[tuple[Box, int]]) -> None:
    shape = parts[0][0].shape
    # Between neighbouring cuts nothing changes, so one cell stands for all elements between them.
    cuts = [
        sorted({0, size, *(edge for box, _ in parts for edge in (box.offset[dim], box.offset[dim] + box.sizes[dim]))})
        for dim, size in enumerate(shape)
    ]
    places = [{cut: place for place, cut in enumerate(of_dim)} for of_dim in cuts]
    times = np.zeros([max(1, len(of_dim) - 1) for of_dim in cuts], dtype=np.int32)
    for box, _ in parts:
        times[_cells(box, places)] += 1
    if any(of_dim[0] < 0 or of_dim[-1] > size for of_dim, size in zip(cuts, shape, strict=True)):
        raise _not_covered(f"parts of {name} leave its shape {shape}")
    wrong = np.argwhere(times != 1)
    if not len(wrong) or 0 in shape:
        return
    cell = tuple(wrong[0].tolist())
    element = tuple(of_dim[place] for of_dim, place in zip(cuts, cell, strict=True))
    holders = [rank for box, rank in parts if _holds(box, element)]
    if not holders:
        raise _not_covered(f"no rank holds element {list(element)} of {name} {list(shape)}")
    raise _not_covered(f"element {list(element)} of {name} {list(shape)} would be written by ranks {holders}")


def _cells(box: Box, places: list[dict[int, int]]) -> tuple[slice, ...]:
    return tuple(
        slice(of_dim[start], of_dim[start + size])
        for of_dim, start, size in zip(places, box.offset, box.sizes, strict=True)
    )


def _holds(box: Box, element: tuple[int, ...]) -> bool:
    return all(start <= at < start + size for start, size, at in zip(box.offset, box.sizes, element, strict=True))


def _not_covered(what: str) -> MemparError:
    return MemparError(
        f"{what}; the parts of all ranks must make up every tensor exactly once; this is an error in mempar: nothing "
        "was written, the checkpoints before are intact; report it with the run's config.yaml."
    )
