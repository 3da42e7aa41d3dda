"""What operations refuse: shapes, dtypes and strides always, rows out of range when they are told to look."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bags import make_bags
from mempar.kernels.dispatch import Backend
from mempar.kernels.peer import peer, peer_backward
from mempar.kernels.product_topk import product_topk
from mempar.kernels.reduce_rows import reduce_row_parts
from mempar.kernels.segment_route import route
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather


def bags() -> dict[str, Tensor]:
    values, row_index, weight, offsets, grad = make_bags("uneven", 8, torch.float32, torch.int32)
    return {"values": values, "row_index": row_index, "weight": weight, "offsets": offsets, "grad": grad}


REFUSED: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "values of one dimension": ("values", lambda t: t[0], "two dimensions"),
    "values of integers": ("values", lambda t: t.nan_to_num().int(), "floating dtype"),
    "columns apart": ("values", lambda t: t.T.contiguous().T, "columns side by side"),
    "rows of bytes": ("row_index", lambda t: t.byte(), "int32 or int64"),
    "rows of two dimensions": ("row_index", lambda t: t[None], "one dimension"),
    "a weight too few": ("weight", lambda t: t[1:], "a number for each of 35 entries"),
    "weights of another dtype": ("weight", lambda t: t.double(), r"the dtype of values, torch\.float32"),
    "offsets of another dtype": ("offsets", lambda t: t.long(), "the dtype of row_index"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weighted_gather_refuses(case: str, backend: Backend) -> None:
    name, spoil, rule = REFUSED[case]
    tensors = bags()
    tensors[name] = spoil(tensors[name])
    arguments = (tensors[each] for each in ("values", "row_index", "weight", "offsets"))
    with pytest.raises(ValueError, match=rf"{name} is \[.*; it must have .*{rule}"):
        weighted_gather(*arguments, backend=backend)


def test_gate_of_another_shape_is_refused(backend: Backend) -> None:
    given = bags()
    with pytest.raises(ValueError, match=r"gate is \[5, 7\] .*; it must have shape \[5, 8\]"):
        weighted_gather(
            given["values"],
            given["row_index"],
            given["weight"],
            given["offsets"],
            backend=backend,
            gate=given["grad"][:, 1:],
        )


@pytest.mark.parametrize(
    ("name", "spoil", "rule"),
    [
        ("grad", lambda t: t[:, 1:], "as many columns as values, 8"),
        ("grad", lambda t: t.double(), r"the dtype of values, torch\.float32"),
        ("bag_index", lambda t: t[1:], "a bag for each entry"),
    ],
    ids=["columns", "dtype", "entries"],
)
def test_gather_scores_refuses(name: str, spoil: Callable[[Tensor], Tensor], rule: str, backend: Backend) -> None:
    given = bags()
    given["bag_index"] = bag_of_entries(given["offsets"], len(given["row_index"]))
    given[name] = spoil(given[name])
    with pytest.raises(ValueError, match=rf"{name} is \[.*; it must have {rule}"):
        gather_scores(given["values"], given["row_index"], given["bag_index"], given["grad"], backend=backend)


@pytest.mark.parametrize("row", [-1, 11, 2**31 - 1])
def test_rows_out_of_range_are_named_when_they_are_looked_for(row: int, checking: Backend) -> None:
    given = bags()
    given["row_index"][3] = row
    with pytest.raises(IndexError, match=rf"row_index holds ids from .*{row}.*, but they are 0 to 10"):
        weighted_gather(given["values"], given["row_index"], given["weight"], given["offsets"], backend=checking)


def test_right_rows_pass_when_they_are_looked_for(backend: Backend, checking: Backend) -> None:
    given = bags()
    arguments = [given[each] for each in ("values", "row_index", "weight", "offsets")]
    assert torch.equal(weighted_gather(*arguments, backend=checking), weighted_gather(*arguments, backend=backend))


def test_strided_inputs_give_the_same_result(backend: Backend) -> None:
    given = bags()
    wide = torch.full((11, 19), torch.nan)
    wide[:, 5:13] = given["values"]
    apart = {name: given[name].repeat_interleave(2)[::2] for name in ("row_index", "weight", "offsets")}
    out = weighted_gather(wide[:, 5:13], apart["row_index"], apart["weight"], apart["offsets"], backend=backend)
    expected = weighted_gather(given["values"], given["row_index"], given["weight"], given["offsets"], backend=backend)
    torch.testing.assert_close(out, expected)
    bag_index = bag_of_entries(given["offsets"], len(given["row_index"]))
    grad = torch.full((5, 21), torch.nan)
    grad[:, 2:10] = given["grad"]
    scores = gather_scores(wide[:, 5:13], apart["row_index"], bag_index, grad[:, 2:10], backend=backend)
    torch.testing.assert_close(
        scores, gather_scores(given["values"], given["row_index"], bag_index, given["grad"], backend=backend)
    )


@pytest.mark.parametrize(
    ("offsets", "found"),
    [([0, 3, 36], "0 to 36"), ([1, 3, 35], "1 to 35"), ([0, 9, 4, 35], "0 to 35"), ([0, 34], "0 to 34")],
    ids=str,
)
def test_offsets_that_do_not_bound_the_entries_are_named_when_they_are_looked_for(
    offsets: list[int], found: str, checking: Backend
) -> None:
    given = bags()
    bounds = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(IndexError, match=f"offsets go from {found}; they must ascend from 0 to 35"):
        weighted_gather(given["values"], given["row_index"], given["weight"], bounds, backend=checking)


def test_no_offsets_at_all_are_refused(backend: Backend) -> None:
    given = bags()
    with pytest.raises(ValueError, match="one dimension and one number at least"):
        weighted_gather(given["values"], given["row_index"], given["weight"], given["offsets"][:0], backend=backend)


@pytest.mark.parametrize("name", ["row_index", "weight", "offsets"])
def test_tensors_of_another_device_are_refused(name: str, backend: Backend) -> None:
    given = bags()
    given[name] = given[name].to("meta")
    arguments = (given[each] for each in ("values", "row_index", "weight", "offsets"))
    with pytest.raises(ValueError, match=rf"{name} is .*; it must have its place on \w+(:0)?, not on meta"):
        weighted_gather(*arguments, backend=backend)


PARTS: dict[str, tuple[list[Tensor], str]] = {
    "no part": ([], "one part at least"),
    "parts of unequal widths": ([torch.zeros(3, 8), torch.zeros(3, 1)], "8 columns, as the first part has"),
    "three dtypes": (
        [torch.zeros(3, 8), torch.zeros(3, 8).bfloat16(), torch.zeros(3, 8).double()],
        r"the dtype torch\.float32 or torch\.bfloat16",
    ),
    "one dimension": ([torch.zeros(8)], "two dimensions"),
}


@pytest.mark.parametrize("case", PARTS)
def test_reduce_row_parts_refuses(case: str, device: torch.device, backend: Backend) -> None:
    parts, rule = PARTS[case]
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=rule):
        reduce_row_parts(index, torch.ones(2), index, [part.to(device) for part in parts], backend=backend)


def test_bags_of_parts_out_of_range_are_named_when_they_are_looked_for(checking: Backend) -> None:
    index = torch.zeros(2, dtype=torch.int32)
    parts = [torch.zeros(3, 8), torch.zeros(2, 8)]
    with pytest.raises(IndexError, match="bag_index holds ids from 5 to 5, but they are 0 to 4"):
        reduce_row_parts(index, torch.ones(2), index + 5, parts, backend=checking)


@pytest.mark.parametrize("slot", [-1, 25])
def test_given_slots_out_of_range_are_named_when_they_are_looked_for(slot: int, checking: Backend) -> None:
    query, keys, slots = torch.randn(2, 1, 2, 4), torch.randn(1, 2, 5, 4), torch.full((2, 1, 3), slot)
    with pytest.raises(IndexError, match=f"slot_index holds ids from {slot} to {slot}, but they are 0 to 24"):
        product_topk(query, keys, 3, slots, backend=checking)


def test_strided_hidden_products_give_the_same_gradients(backend: Backend) -> None:
    down, values, x, grad = (torch.randn(rows, 8) for rows in (11, 11, 2, 2))
    index, weight = torch.randint(11, (6,), dtype=torch.int32), torch.rand(6)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    _, hidden = peer(down, values, index, weight, offsets, x, backend=backend)
    expected = peer_backward(down, values, index, weight, offsets, hidden, grad, backend=backend)
    apart = [each.repeat_interleave(2)[::2] for each in (index, weight, offsets, hidden)]
    found = peer_backward(down, values, *apart, grad, backend=backend)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_strided_numbers_of_reads_give_the_same_entries(backend: Backend) -> None:
    slots = torch.randint(4, (3, 6))
    routed = route(slots, torch.tensor([0, 2, 4]), merge=True, backend=backend)
    weight = torch.rand(3, 6)
    apart = weight.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(routed.to_entries(apart), routed.to_entries(weight))
    parts = torch.rand(2 * routed.row_index.numel())
    assert torch.equal(routed.to_reads(parts.repeat_interleave(2)[::2]), routed.to_reads(parts))
    one = torch.ones(())
    assert torch.equal(routed.to_reads(one.expand_as(parts)), torch.full((18,), 2.0))
    with pytest.raises(ValueError, match="a number for each of 18 reads"):
        routed.to_entries(weight[:2])
    with pytest.raises(ValueError, match="one or more numbers for each of"):
        routed.to_reads(parts[:-1])


def test_a_backend_has_one_of_two_names() -> None:
    with pytest.raises(ValueError, match="named triton or torch, not auto"):
        Backend(name="auto")
