"""What operations refuse: shapes, dtypes and strides always, rows out of range when they are told to look."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bags import make_bags
from mempar.kernels.dispatch import Backend
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
    with pytest.raises(IndexError, match=rf"row_index holds ids from .*{row}.*, but rows are 0 to 10"):
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
