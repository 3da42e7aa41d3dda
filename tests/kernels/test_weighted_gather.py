"""Weighted sums of rows and products with them, against their references."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bags import BAGS, NUM_ROWS, WIDTHS, assert_near, every_case, every_dtype, every_index_dtype, make_bags
from mempar.kernels.dispatch import Backend
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.reduce_rows import reference as reduce_reference
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather
from mempar.kernels.weighted_gather import reference as gather_reference
from mempar.kernels.weighted_gather.native import scores_in_chunks


@every_case
@every_dtype
@every_index_dtype
def test_weighted_gather_matches_reference(
    case: str, dtype: torch.dtype, index_dtype: torch.dtype, backend: Backend
) -> None:
    for width in WIDTHS:
        values, row_index, weight, offsets, _ = make_bags(case, width, dtype, index_dtype)
        out = weighted_gather(values, row_index, weight, offsets, backend=backend)
        expected = gather_reference.weighted_gather(values.double(), row_index, weight.double(), offsets)
        magnitude = gather_reference.weighted_gather(values.double().abs(), row_index, weight.double().abs(), offsets)
        assert_near(out, expected, magnitude, dtype, max(BAGS[case]))


@every_dtype
@every_index_dtype
def test_weighted_gather_returns_nothing_when_there_are_no_bags(
    dtype: torch.dtype, index_dtype: torch.dtype, backend: Backend
) -> None:
    nothing = torch.zeros(0, dtype=index_dtype)
    out = weighted_gather(
        torch.randn(3, 7).to(dtype), nothing, torch.zeros(0, dtype=dtype), nothing.new_zeros(1), backend=backend
    )
    assert (out.shape, out.dtype) == ((0, 7), dtype)


@every_case
@every_dtype
@every_index_dtype
def test_gather_scores_match_reference(
    case: str, dtype: torch.dtype, index_dtype: torch.dtype, backend: Backend
) -> None:
    for width in WIDTHS:
        values, row_index, _, offsets, grad = make_bags(case, width, dtype, index_dtype)
        bags = bag_of_entries(offsets, len(row_index))
        expected = gather_reference.gather_scores(values.double(), row_index, bags, grad.double())
        magnitude = gather_reference.gather_scores(values.double().abs(), row_index, bags, grad.double().abs())
        # The second is what CUDA runs.
        for out in (
            gather_scores(values, row_index, bags, grad, backend=backend),
            scores_in_chunks(values, row_index, bags, grad, chunk_elements=5 * width + 1),
        ):
            assert_near(out, expected, magnitude, dtype, width)


@every_case
def test_references_match_dense_matrices(case: str) -> None:
    values, row_index, weight, offsets, grad = make_bags(case, 5, torch.float64, torch.int64)
    values, bags = values.nan_to_num(), bag_of_entries(offsets, len(row_index))
    # [B, S], the weight of each row in each bag
    matrix = torch.zeros(len(grad), NUM_ROWS, dtype=torch.float64)
    matrix.index_put_((bags, row_index), weight, accumulate=True)
    gathered = gather_reference.weighted_gather(values, row_index, weight, offsets)
    torch.testing.assert_close(gathered, matrix @ values, rtol=0, atol=1e-12)
    scores = gather_reference.gather_scores(values, row_index, bags, grad)
    torch.testing.assert_close(scores, (grad @ values.T)[bags, row_index], rtol=0, atol=1e-12)
    rows, sums = reduce_reference.reduce_rows(row_index, weight, bags, grad)
    torch.testing.assert_close(sums, (matrix.T @ grad)[rows], rtol=0, atol=1e-12)


def test_gather_scores_and_reduced_rows_are_the_gradients_of_weighted_gather(backend: Backend) -> None:
    values, row_index, weight, offsets, grad = make_bags("uneven", 7, torch.float64, torch.int32)
    values = values.nan_to_num().requires_grad_()
    weight.requires_grad_()
    out = gather_reference.weighted_gather(values, row_index, weight, offsets)
    values_grad, weight_grad = torch.autograd.grad(out, (values, weight), grad)
    bags = bag_of_entries(offsets, len(row_index))
    scores = gather_scores(values.detach(), row_index, bags, grad, backend=backend)
    torch.testing.assert_close(scores, weight_grad, rtol=0, atol=1e-12)
    rows, sums = reduce_rows(row_index, weight.detach(), bags, grad, backend=backend)
    dense = torch.zeros_like(values).index_copy(0, rows.long(), sums)
    torch.testing.assert_close(dense, values_grad, rtol=0, atol=1e-12)


def test_bag_of_entries_skips_empty_bags() -> None:
    assert bag_of_entries(torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32), 3).tolist() == [1, 1, 3]
    assert bag_of_entries(torch.tensor([0]), 0).tolist() == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    width=st.integers(1, 70),
    num_rows=st.integers(1, 9),
    gap=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_any_bags_match_reference(
    sizes: list[int], width: int, num_rows: int, gap: int, seed: int, backend: Backend
) -> None:
    torch.manual_seed(seed)
    # Rows lie apart, and what lies between them is never read.
    table = torch.full((num_rows, width + gap), torch.nan, dtype=torch.float64)
    values = table[:, :width].normal_()
    row_index = torch.randint(num_rows, (sum(sizes),))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    weight, grad = (torch.randn(shape, dtype=torch.float64) for shape in ((sum(sizes),), (len(sizes), width)))
    bags = bag_of_entries(offsets, len(row_index))
    scores = gather_scores(values, row_index, bags, grad, backend=backend)
    torch.testing.assert_close(
        scores, gather_reference.gather_scores(values, row_index, bags, grad), rtol=1e-12, atol=1e-12
    )
    out = weighted_gather(values, row_index, weight, offsets, backend=backend)
    expected = (
        gather_reference.weighted_gather(values, row_index, weight, offsets) if sizes else out.new_zeros(0, width)
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_gated_sums_are_sums_times_silu(backend: Backend) -> None:
    values, row_index, weight, offsets, gate = make_bags("uneven", 33, torch.float64, torch.int32)
    out = weighted_gather(values, row_index, weight, offsets, backend=backend, gate=gate)
    sums = gather_reference.weighted_gather(values, row_index, weight, offsets)
    torch.testing.assert_close(out, sums * torch.nn.functional.silu(gate), rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck() -> None:
    values, row_index, weight, offsets, _ = make_bags("uneven", 3, torch.float64, torch.int32)
    inputs = values.nan_to_num().requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values, weight: gather_reference.weighted_gather(values, row_index, weight, offsets), inputs
    )
