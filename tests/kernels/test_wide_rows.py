"""Rows of several blocks of columns, as those of large models are, against torch's operators."""

import pytest
import torch
from torch import Tensor

from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.peer import peer, peer_backward
from mempar.kernels.reduce_rows import reduce_row_parts
from mempar.kernels.row_update import backward_and_update, reduce_and_update, update_rows
from mempar.kernels.segment_route import pack_columns, unpack_columns
from mempar.kernels.weighted_gather import gather_scores, weighted_gather
from row_tables import BF16, copy_of, make_table, part_of, tensors_of

# Two blocks of 1024 columns and the beginning of a third.
WIDTH, TILE = 2500, 100
NUM_ROWS, NUM_BAGS, READS = 5, 2, 3


@pytest.fixture
def reads() -> dict[str, Tensor]:
    return {
        "values": torch.randn(NUM_ROWS, WIDTH),
        "row_index": torch.randint(NUM_ROWS, (NUM_BAGS * READS,), dtype=torch.int32),
        "weight": torch.rand(NUM_BAGS * READS),
        "offsets": torch.arange(0, NUM_BAGS * READS + 1, READS, dtype=torch.int32),
        "bag_index": torch.arange(NUM_BAGS, dtype=torch.int32).repeat_interleave(READS),
        "grad": torch.randn(NUM_BAGS, WIDTH),
    }


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_wide_rows_are_gathered_and_multiplied(reads: dict[str, Tensor], backend: Backend) -> None:
    values, index, grad = reads["values"], reads["row_index"], reads["grad"]
    sums = [weighted_gather(values, index, reads["weight"], reads["offsets"], backend=by) for by in (backend, TORCH)]
    assert_same(*sums)
    scores = [gather_scores(values, index, reads["bag_index"], grad, backend=by) for by in (backend, TORCH)]
    assert_same(*scores)


def test_wide_gradients_are_reduced(reads: dict[str, Tensor], backend: Backend) -> None:
    parts = [reads["grad"][:1], reads["grad"][1:].bfloat16()]
    found = [
        reduce_row_parts(reads["row_index"], reads["weight"], reads["bag_index"], parts, backend=by)
        for by in (backend, TORCH)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["adagrad", "adam"])
@pytest.mark.parametrize("form", ["update", "deposits", "backward"])
def test_wide_rows_are_updated(name: str, form: str, reads: dict[str, Tensor], backend: Backend) -> None:
    table, rule = make_table(name, part_of(NUM_ROWS, WIDTH), torch.float32, column_tile=TILE)
    tables = [(table, rule), copy_of(table, rule)]
    entries = (reads["row_index"], reads["weight"], reads["bag_index"])
    rows, grad = torch.arange(NUM_ROWS, dtype=torch.int32), torch.randn(NUM_ROWS, WIDTH)
    for by, (its_table, its_rule) in zip((backend, TORCH), tables, strict=True):
        if form == "update":
            update_rows(its_table, its_rule, rows, grad, step=3, backend=by)
        elif form == "deposits":
            reduce_and_update(its_table, its_rule, *entries, [reads["grad"]], step=3, backend=by)
        else:
            backward_and_update(its_table, its_rule, *entries, reads["grad"], step=3, backend=by)
    for one, other in zip(*(tensors_of(*each).values() for each in tables), strict=True):
        assert_same(one, other)


def test_wide_rows_are_rounded_by_the_same_bits(backend: Backend) -> None:
    table, rule = make_table("adagrad", part_of(NUM_ROWS, WIDTH), BF16, rounding="stochastic", column_tile=TILE)
    tables = [(table, rule), copy_of(table, rule)]
    rows, grad = torch.arange(NUM_ROWS, dtype=torch.int32), torch.randn(NUM_ROWS, WIDTH)
    for by, each in zip((backend, TORCH), tables, strict=True):
        update_rows(*each, rows, grad, step=3, backend=by)
    # An update whose last bit differs may fall to the other neighbour: few do.
    assert (tables[0][0].values != tables[1][0].values).float().mean() < 1e-3


def test_wide_columns_are_packed_and_put_together(backend: Backend) -> None:
    cuts = [0, 1100, 1200, WIDTH]
    numbers = torch.randn(3, WIDTH)
    packed = [pack_columns(numbers, cuts, 2, backend=by) for by in (backend, TORCH)]
    assert torch.equal(*packed)
    together = [unpack_columns(packed[1], cuts, 3, 2, backend=by) for by in (backend, TORCH)]
    assert torch.equal(*together)


def test_wide_experts_are_asked_and_differentiated(reads: dict[str, Tensor], backend: Backend) -> None:
    down, x = torch.randn(NUM_ROWS, WIDTH) / WIDTH**0.5, torch.randn(NUM_BAGS, WIDTH)
    given = (down, reads["values"], reads["row_index"], reads["weight"], reads["offsets"])
    found = [peer(*given, x, backend=by) for by in (backend, TORCH)]
    assert_same(found[0][0], found[1][0])
    grads = [peer_backward(*given, found[1][1], reads["grad"], backend=by) for by in (backend, TORCH)]
    for one, other in zip(*grads, strict=True):
        assert_same(one, other)
