"""The kernels' operations against their references, at awkward sizes, and their rule for ties."""

import pytest
import torch
from torch import Tensor

import oracle
from mempar.kernels.product_topk import product_topk
from mempar.kernels.product_topk import reference as topk_reference
from mempar.kernels.product_topk.stable import stable_topk
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.reduce_rows import reference as reduce_reference
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, scores_in_chunks, weighted_gather
from mempar.kernels.weighted_gather import reference as gather_reference

NUM_ROWS = 11
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
# Entries in each bag; they hit any row, or those of HIT_ROWS.
BAGS = {
    "one_token": [6],
    "one_entry": [1],
    "uneven": [3, 7, 1, 20, 4],
    "empty_bags": [0, 3, 0, 0, 5, 0],
    "no_entries": [0, 0, 0],
    "duplicates": [8, 9, 10],
    "one_row": [5, 0, 17],
}
HIT_ROWS = {"duplicates": [4, 9, 10], "one_row": [10]}


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    # Shown by pytest when a test fails; torch.manual_seed(it) repeats the test.
    print(f"torch seed {torch.seed()}")


def make_bags(case: str, width: int, dtype: torch.dtype, index_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """values [S, D], NaN where no entry looks, row_index [E], weight [E], offsets [B + 1], grad [B, D]."""
    sizes, choice = BAGS[case], torch.tensor(HIT_ROWS.get(case, range(NUM_ROWS)), dtype=index_dtype)
    row_index = choice[torch.randint(len(choice), (sum(sizes),))]
    offsets = torch.tensor([0, *sizes], dtype=index_dtype).cumsum(0, dtype=index_dtype)
    values = torch.full((NUM_ROWS, width), torch.nan, dtype=dtype)
    values[row_index.long()] = torch.randn(NUM_ROWS, width).to(dtype)[row_index.long()]
    weight, grad = torch.randn(sum(sizes)).to(dtype), torch.randn(len(sizes), width).to(dtype)
    return values, row_index, weight, offsets, grad


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, num_terms: int) -> None:
    """A sum of n rounded terms errs by n eps of their magnitudes' sum at most; one eps more rounds the result."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert bool((error <= (num_terms + 2) * torch.finfo(dtype).eps * magnitude).all()), f"largest error {error.max()}"


every_case = pytest.mark.parametrize("case", BAGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_index_dtype = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
WIDTHS = (1, 7, 33, 100)


@every_case
@every_dtype
@every_index_dtype
def test_weighted_gather_matches_reference(case: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    for width in WIDTHS:
        values, row_index, weight, offsets, _ = make_bags(case, width, dtype, index_dtype)
        out = weighted_gather(values, row_index, weight, offsets)
        expected = gather_reference.weighted_gather(values.double(), row_index, weight.double(), offsets)
        magnitude = gather_reference.weighted_gather(values.double().abs(), row_index, weight.double().abs(), offsets)
        assert_near(out, expected, magnitude, dtype, max(BAGS[case]))


@every_dtype
@every_index_dtype
def test_weighted_gather_returns_nothing_when_there_are_no_bags(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    nothing = torch.zeros(0, dtype=index_dtype)
    out = weighted_gather(torch.randn(3, 7).to(dtype), nothing, torch.zeros(0, dtype=dtype), nothing.new_zeros(1))
    assert (out.shape, out.dtype) == ((0, 7), dtype)


@every_case
@every_dtype
@every_index_dtype
def test_gather_scores_match_reference(case: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    for width in WIDTHS:
        values, row_index, _, offsets, grad = make_bags(case, width, dtype, index_dtype)
        bags = bag_of_entries(offsets, len(row_index))
        expected = gather_reference.gather_scores(values.double(), row_index, bags, grad.double())
        magnitude = gather_reference.gather_scores(values.double().abs(), row_index, bags, grad.double().abs())
        # The second is what CUDA runs.
        for out in (
            gather_scores(values, row_index, bags, grad),
            scores_in_chunks(values, row_index, bags, grad, chunk_elements=5 * width + 1),
        ):
            assert_near(out, expected, magnitude, dtype, width)


@every_case
@every_dtype
@every_index_dtype
def test_reduce_rows_matches_reference(case: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    for width in WIDTHS:
        _, row_index, weight, offsets, grad = make_bags(case, width, dtype, index_dtype)
        bag_index = bag_of_entries(offsets, len(row_index))
        rows, sums = reduce_rows(row_index, weight, bag_index, grad)
        expected_rows, expected = reduce_reference.reduce_rows(row_index, weight.double(), bag_index, grad.double())
        _, magnitude = reduce_reference.reduce_rows(row_index, weight.double().abs(), bag_index, grad.double().abs())
        assert rows.dtype == index_dtype
        assert rows.tolist() == sorted(set(row_index.tolist())) == expected_rows.tolist()
        assert_near(sums, expected, magnitude, dtype, len(row_index))


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


def test_gather_scores_and_reduced_rows_are_the_gradients_of_weighted_gather() -> None:
    values, row_index, weight, offsets, grad = make_bags("uneven", 7, torch.float64, torch.int32)
    values = values.nan_to_num().requires_grad_()
    weight.requires_grad_()
    out = gather_reference.weighted_gather(values, row_index, weight, offsets)
    values_grad, weight_grad = torch.autograd.grad(out, (values, weight), grad)
    bags = bag_of_entries(offsets, len(row_index))
    scores = gather_scores(values.detach(), row_index, bags, grad)
    torch.testing.assert_close(scores, weight_grad, rtol=0, atol=1e-12)
    rows, sums = reduce_rows(row_index, weight.detach(), bags, grad)
    dense = torch.zeros_like(values).index_copy(0, rows.long(), sums)
    torch.testing.assert_close(dense, values_grad, rtol=0, atol=1e-12)


def test_bag_of_entries_skips_empty_bags() -> None:
    assert bag_of_entries(torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32), 3).tolist() == [1, 1, 3]
    assert bag_of_entries(torch.tensor([0]), 0).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reduced_row_is_bitwise_the_same_when_other_rows_interleave(dtype: torch.dtype) -> None:
    grad, weight = torch.randn(40, 33, dtype=dtype), torch.randn(40, dtype=dtype)
    row_index = torch.randint(5, (40,), dtype=torch.int32)
    rows, sums = reduce_rows(row_index, weight, torch.arange(40), grad)
    for row, total in zip(rows.tolist(), sums, strict=True):
        mine = (row_index == row).nonzero().squeeze(1)
        _, alone = reduce_rows(row_index[mine], weight[mine], mine, grad)
        assert torch.equal(alone[0], total)


def normal_halves(num_tokens: int, num_heads: int, num_subkeys: int, width: int) -> tuple[Tensor, Tensor]:
    """Query [T, H, 2, Q] and keys [H, 2, N, Q], float64: rounding makes no ties."""
    query = torch.randn(num_tokens, num_heads, 2, width, dtype=torch.float64)
    return query, torch.randn(num_heads, 2, num_subkeys, width, dtype=torch.float64)


topk_shapes = pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_subkeys", "width", "top_k"),
    [(1, 1, 1, 1, 1), (1, 3, 7, 5, 4), (5, 2, 9, 3, 9), (17, 2, 13, 6, 1), (3, 1, 12, 33, 12), (6, 4, 40, 2, 32)],
)


@topk_shapes
def test_product_topk_matches_oracle(num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width)
    slot, score = product_topk(query, keys, top_k)
    expected_slot, expected_score = oracle.product_key_topk(query, keys, top_k)
    assert slot.dtype == torch.int64
    assert torch.equal(slot, expected_slot)
    assert torch.equal(slot, topk_reference.select_slots(query, keys, top_k))
    torch.testing.assert_close(score, expected_score, rtol=0, atol=1e-12)


@topk_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product_topk_gives_ties_to_the_lowest_slot_when_scores_are_small_integers(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, dtype: torch.dtype
) -> None:
    # Integers add up exactly in any order, so every tie is exact; with many tokens there are many of them.
    query = torch.randint(-1, 2, (10 * num_tokens, num_heads, 2, width)).to(dtype)
    keys = torch.randint(-1, 2, (num_heads, 2, num_subkeys, width)).to(dtype)
    slot, score = product_topk(query, keys, top_k)
    expected_slot, expected_score = oracle.product_key_topk(query, keys, top_k)
    assert torch.equal(slot, expected_slot)
    assert torch.equal(score, expected_score)
    assert torch.equal(slot, topk_reference.select_slots(query, keys, top_k))


@pytest.mark.parametrize("top_k", [1, 5, 9])
def test_product_topk_chooses_the_first_slots_when_all_keys_are_equal(top_k: int) -> None:
    query, keys = normal_halves(4, 2, 9, 3)
    slot, score = product_topk(query, keys[:, :, :1].expand_as(keys).contiguous(), top_k)
    assert torch.equal(slot, torch.arange(top_k).expand(4, 2, top_k))
    assert torch.equal(score, score[..., :1].expand_as(score))


def test_product_topk_chooses_the_lowest_slots_when_half_the_keys_are_equal() -> None:
    query, keys = normal_halves(4, 2, 9, 3)
    keys[:, 1] = keys[:, 1, :1]
    slot, _ = product_topk(query, keys, 5)
    assert torch.equal(slot, oracle.product_key_topk(query, keys, 5)[0])


def test_product_topk_passes_gradcheck() -> None:
    query, keys = normal_halves(3, 2, 5, 3)
    inputs = query.requires_grad_(), keys.requires_grad_()
    assert torch.autograd.gradcheck(lambda query, keys: product_topk(query, keys, 4)[1], inputs)


@topk_shapes
def test_product_topk_gradients_match_oracle(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int
) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width)
    inputs = query.requires_grad_(), keys.requires_grad_()
    _, score = product_topk(query, keys, top_k)
    grad = torch.randn_like(score)
    ours = torch.autograd.grad(score, inputs, grad)
    truth = torch.autograd.grad(oracle.product_key_topk(query, keys, top_k)[1], inputs, grad)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_replayed_slots_give_the_same_scores_and_gradients(dtype: torch.dtype) -> None:
    query, keys = (half.to(dtype).requires_grad_() for half in normal_halves(6, 3, 7, 5))
    slot, score = product_topk(query, keys, 4)
    same_slot, same_score = product_topk(query, keys, 4, slot.clone())
    assert torch.equal(slot, same_slot)
    assert torch.equal(score, same_score)
    grad = torch.randn_like(score)
    first = torch.autograd.grad(score, (query, keys), grad)
    again = torch.autograd.grad(same_score, (query, keys), grad)
    assert all(map(torch.equal, first, again))


def test_replayed_slots_are_scored_when_they_are_not_the_best_and_repeat() -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(6, 3, 7, 5))
    slot = torch.randint(49, (6, 3, 4))
    slot[0] = 48
    used, score = product_topk(query, keys, 4, slot)
    expected = oracle.slot_scores(query, keys).gather(-1, slot)
    assert torch.equal(used, slot)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(score)
    ours = torch.autograd.grad(score, (query, keys), grad)
    truth = torch.autograd.grad(expected, (query, keys), grad)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_product_topk_gives_no_gradient_to_unselected_keys() -> None:
    query, keys = normal_halves(2, 2, 20, 3)
    keys.requires_grad_()
    slot, score = product_topk(query, keys, 3)
    score.square().sum().backward()
    for head in range(2):
        for half, index in enumerate((slot[:, head] // 20, slot[:, head] % 20)):
            touched = keys.grad[head, half].abs().sum(-1) > 0
            assert touched.nonzero().squeeze(1).tolist() == index.unique().tolist()


def test_product_topk_takes_no_tokens() -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(0, 2, 5, 3))
    slot, score = product_topk(query, keys, 4)
    assert slot.shape == score.shape == (0, 2, 4)
    score.sum().backward()
    assert query.grad.shape == query.shape
    assert torch.equal(keys.grad, torch.zeros_like(keys))


def test_product_topk_chooses_the_same_for_one_token_and_for_many() -> None:
    query = torch.randint(-2, 3, (9, 2, 2, 4)).double()
    keys = torch.randint(-2, 3, (2, 2, 11, 4)).double()
    alone = torch.cat([product_topk(token, keys, 6)[0] for token in query.split(1)])
    assert torch.equal(product_topk(query, keys, 6)[0], alone)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 3, 9)])
@pytest.mark.parametrize("top_k", [1, 4, 8, 9])
@pytest.mark.parametrize("spread", [1, 3, 10**6])
def test_stable_topk_matches_stable_sort(shape: tuple[int, ...], top_k: int, spread: int) -> None:
    values = torch.randint(-spread, spread + 1, shape).float()
    best, position = stable_topk(values, top_k)
    sorted_values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    assert torch.equal(best, sorted_values[..., :top_k])
    assert torch.equal(position, order[..., :top_k])


@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_stable_topk_orders_equal_values_by_tie_key(top_k: int) -> None:
    values = torch.randint(3, (50, 9)).double()
    tie_key = torch.stack([torch.randperm(100)[:9] for _ in range(50)])
    best, position = stable_topk(values, top_k, tie_key)
    for row, key, value, place in zip(values.tolist(), tie_key.tolist(), best.tolist(), position.tolist(), strict=True):
        order = sorted(range(9), key=lambda index: (-row[index], key[index]))[:top_k]
        assert place == order
        assert value == [row[index] for index in order]


def test_stable_topk_treats_signed_zeros_as_equal() -> None:
    values = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]])
    assert stable_topk(values, 3)[1].tolist() == [[0, 1, 3]]
