"""Product-key top-K against the oracle and its reference, and its rule for ties."""

import pytest
import torch
from torch import Tensor

import oracle
from mempar.kernels.dispatch import Backend
from mempar.kernels.product_topk import product_topk
from mempar.kernels.product_topk import reference as topk_reference
from mempar.kernels.product_topk.stable import stable_topk


def normal_halves(num_tokens: int, num_heads: int, num_subkeys: int, width: int) -> tuple[Tensor, Tensor]:
    """Query [T, H, 2, Q] and keys [H, 2, N, Q], float64: rounding makes no ties."""
    query = torch.randn(num_tokens, num_heads, 2, width, dtype=torch.float64)
    return query, torch.randn(num_heads, 2, num_subkeys, width, dtype=torch.float64)


topk_shapes = pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_subkeys", "width", "top_k"),
    [(1, 1, 1, 1, 1), (1, 3, 7, 5, 4), (5, 2, 9, 3, 9), (17, 2, 13, 6, 1), (3, 1, 12, 33, 12), (6, 4, 40, 2, 32)],
)


@topk_shapes
def test_product_topk_matches_oracle(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, backend: Backend
) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width)
    slot, score = product_topk(query, keys, top_k, backend=backend)
    expected_slot, expected_score = oracle.product_key_topk(query, keys, top_k)
    assert slot.dtype == torch.int64
    assert torch.equal(slot, expected_slot)
    assert torch.equal(slot, topk_reference.select_slots(query, keys, top_k))
    torch.testing.assert_close(score, expected_score, rtol=0, atol=1e-12)


@topk_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product_topk_gives_ties_to_the_lowest_slot_when_scores_are_small_integers(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, dtype: torch.dtype, backend: Backend
) -> None:
    # Integers add up exactly in any order, so every tie is exact; with many tokens there are many of them.
    query = torch.randint(-1, 2, (10 * num_tokens, num_heads, 2, width)).to(dtype)
    keys = torch.randint(-1, 2, (num_heads, 2, num_subkeys, width)).to(dtype)
    slot, score = product_topk(query, keys, top_k, backend=backend)
    expected_slot, expected_score = oracle.product_key_topk(query, keys, top_k)
    assert torch.equal(slot, expected_slot)
    assert torch.equal(score, expected_score)
    assert torch.equal(slot, topk_reference.select_slots(query, keys, top_k))


@pytest.mark.parametrize("top_k", [1, 5, 9])
def test_product_topk_chooses_the_first_slots_when_all_keys_are_equal(top_k: int, backend: Backend) -> None:
    query, keys = normal_halves(4, 2, 9, 3)
    slot, score = product_topk(query, keys[:, :, :1].expand_as(keys).contiguous(), top_k, backend=backend)
    assert torch.equal(slot, torch.arange(top_k).expand(4, 2, top_k))
    assert torch.equal(score, score[..., :1].expand_as(score))


def test_product_topk_chooses_the_lowest_slots_when_half_the_keys_are_equal(backend: Backend) -> None:
    query, keys = normal_halves(4, 2, 9, 3)
    keys[:, 1] = keys[:, 1, :1]
    slot, _ = product_topk(query, keys, 5, backend=backend)
    assert torch.equal(slot, oracle.product_key_topk(query, keys, 5)[0])


def test_product_topk_passes_gradcheck(backend: Backend) -> None:
    query, keys = normal_halves(3, 2, 5, 3)
    inputs = query.requires_grad_(), keys.requires_grad_()
    assert torch.autograd.gradcheck(lambda query, keys: product_topk(query, keys, 4, backend=backend)[1], inputs)


@topk_shapes
def test_product_topk_gradients_match_oracle(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, backend: Backend
) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width)
    inputs = query.requires_grad_(), keys.requires_grad_()
    _, score = product_topk(query, keys, top_k, backend=backend)
    grad = torch.randn_like(score)
    ours = torch.autograd.grad(score, inputs, grad)
    truth = torch.autograd.grad(oracle.product_key_topk(query, keys, top_k)[1], inputs, grad)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_replayed_slots_give_the_same_scores_and_gradients(dtype: torch.dtype, backend: Backend) -> None:
    query, keys = (half.to(dtype).requires_grad_() for half in normal_halves(6, 3, 7, 5))
    slot, score = product_topk(query, keys, 4, backend=backend)
    same_slot, same_score = product_topk(query, keys, 4, slot.clone(), backend=backend)
    assert torch.equal(slot, same_slot)
    assert torch.equal(score, same_score)
    grad = torch.randn_like(score)
    first = torch.autograd.grad(score, (query, keys), grad)
    again = torch.autograd.grad(same_score, (query, keys), grad)
    assert all(map(torch.equal, first, again))


def test_replayed_slots_are_scored_when_they_are_not_the_best_and_repeat(backend: Backend) -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(6, 3, 7, 5))
    slot = torch.randint(49, (6, 3, 4))
    slot[0] = 48
    used, score = product_topk(query, keys, 4, slot, backend=backend)
    expected = oracle.slot_scores(query, keys).gather(-1, slot)
    assert torch.equal(used, slot)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(score)
    ours = torch.autograd.grad(score, (query, keys), grad)
    truth = torch.autograd.grad(expected, (query, keys), grad)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_product_topk_gives_no_gradient_to_unselected_keys(backend: Backend) -> None:
    query, keys = normal_halves(2, 2, 20, 3)
    keys.requires_grad_()
    slot, score = product_topk(query, keys, 3, backend=backend)
    score.square().sum().backward()
    for head in range(2):
        for half, index in enumerate((slot[:, head] // 20, slot[:, head] % 20)):
            touched = keys.grad[head, half].abs().sum(-1) > 0
            assert touched.nonzero().squeeze(1).tolist() == index.unique().tolist()


def test_product_topk_takes_no_tokens(backend: Backend) -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(0, 2, 5, 3))
    slot, score = product_topk(query, keys, 4, backend=backend)
    assert slot.shape == score.shape == (0, 2, 4)
    score.sum().backward()
    assert query.grad.shape == query.shape
    assert torch.equal(keys.grad, torch.zeros_like(keys))


def test_product_topk_chooses_the_same_for_one_token_and_for_many(backend: Backend) -> None:
    query = torch.randint(-2, 3, (9, 2, 2, 4)).double()
    keys = torch.randint(-2, 3, (2, 2, 11, 4)).double()
    alone = torch.cat([product_topk(token, keys, 6, backend=backend)[0] for token in query.split(1)])
    assert torch.equal(product_topk(query, keys, 6, backend=backend)[0], alone)


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
