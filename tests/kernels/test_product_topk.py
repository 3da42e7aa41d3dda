"""Product-key top-K against the oracle and its reference, and its rule for ties."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from halves import BF16, EPSILON, FLOAT32, FLOAT64, kernel_shapes, normal_halves, normalisation, precisions, topk_shapes
from mempar.kernels.dispatch import Backend, interpreted
from mempar.kernels.product_topk import native, product_topk
from mempar.kernels.product_topk import reference as topk_reference
from mempar.kernels.product_topk.pairs import winning_pairs


@pytest.fixture
def seen_scores(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The half scores [H, 2, t, N] of the chunks that were chosen from: another product may round otherwise."""
    seen: list[Tensor] = []
    score_half = native.half_scores

    def observe_native(*arguments: Any) -> Tensor:
        seen.append(score_half(*arguments))
        return seen[-1]

    monkeypatch.setattr(native, "half_scores", observe_native)
    if backend.is_triton:
        from mempar.kernels.product_topk import fused

        scores_into = fused._scores_into

        def observe_fused(inverse_rms: Tensor | None, query: Tensor, keys: Tensor, *rest: Any, **options: Any) -> Any:
            scores, largest = scores_into(inverse_rms, query, keys, *rest, **options)
            seen.append(scores[..., : keys.shape[2]].permute(1, 2, 0, 3).float())
            return scores, largest

        monkeypatch.setattr(fused, "_scores_into", observe_fused)
    return seen


@contextmanager
def unwritten_memory_is_nan(device: torch.device) -> Iterator[None]:
    """Fill what torch.empty returns with NaN and the largest integers."""
    if device.type == "cuda":
        # There the mode forbids more than it fills.
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@topk_shapes
def test_product_topk_matches_oracle(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, backend: Backend
) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width)
    slot, weight = product_topk(query, keys, top_k, backend=backend)
    expected_slot, expected_score = oracle.product_key_topk(query, keys, top_k)
    assert slot.dtype == torch.int64
    assert torch.equal(slot, expected_slot)
    assert torch.equal(slot, topk_reference.select_slots(topk_reference.half_scores(query, keys), top_k))
    torch.testing.assert_close(weight, expected_score.softmax(-1), rtol=0, atol=1e-12)


@kernel_shapes
@pytest.mark.parametrize(
    ("dtype", "score_dtype", "normalised"),
    [
        (FLOAT32, FLOAT32, False),
        (BF16, FLOAT32, False),
        (BF16, FLOAT32, True),
        (BF16, BF16, False),
        (BF16, BF16, True),
        (FLOAT32, BF16, True),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_choice_is_exact_given_the_half_scores(
    num_tokens: int,
    num_heads: int,
    num_subkeys: int,
    width: int,
    top_k: int,
    dtype: torch.dtype,
    score_dtype: torch.dtype,
    normalised: bool,
    device: torch.device,
    backend: Backend,
    seen_scores: list[Tensor],
) -> None:
    query, keys = normal_halves(num_tokens, num_heads, num_subkeys, width, dtype)
    norms = tuple(torch.rand(width).add(0.5).to(dtype) if normalised else None for _ in range(2))
    options = {"query_norm": norms[0], "key_norm": norms[1], "norm_epsilon": EPSILON}
    with unwritten_memory_is_nan(device):
        slot, weight = product_topk(query, keys, top_k, backend=backend, score_dtype=score_dtype, **options)
    (scores,) = seen_scores
    assert torch.equal(slot, topk_reference.select_slots(scores, top_k))
    assert weight.dtype == FLOAT32
    torch.testing.assert_close(weight, topk_reference.slot_weights(scores, slot), rtol=1e-5, atol=1e-7)
    wide_norms = [None if norm is None else norm.double() for norm in norms]
    exact = topk_reference.half_scores(query.double(), keys.double(), *wide_norms, EPSILON)
    # A bound of a sum's rounding is the sum of its terms' magnitudes; so of what is rounded before.
    magnitude = topk_reference.half_scores(query.double().abs(), keys.double().abs(), *wide_norms, EPSILON)
    rounding = (width + 8) * torch.finfo(FLOAT32).eps
    if score_dtype == BF16:
        assert torch.equal(scores, scores.bfloat16().float())
        # Rounding to nearest errs by half an eps; of the score, and of each operand that is not bf16 as it comes.
        operands = 2 if dtype == FLOAT32 else int(normalised)
        rounding += (0.5 + 0.51 * operands) * torch.finfo(BF16).eps
    assert bool(((scores - exact).abs() <= rounding * magnitude).all())


def test_bf16_scores_are_rounded_to_nearest_even(backend: Backend, seen_scores: list[Tensor]) -> None:
    # Their float32 sums are exact: a number of 8 bits, and what is half or a quarter of its last one.
    query = torch.tensor([1.0, 2.0**-8, 2.0**-9])
    keys = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0078125, 1.0, 0.0], [-1.0, -1.0, 0.0]])
    expected = torch.tensor([1.0, 1.0078125, 1.0, 1.015625, -1.0])
    halves = query.expand(1, 1, 2, 3).bfloat16(), keys.expand(1, 2, 5, 3).bfloat16()
    product_topk(*halves, 2, backend=backend, score_dtype=BF16)
    assert torch.equal(seen_scores[0], expected.expand(1, 2, 1, 5))


@topk_shapes
@pytest.mark.parametrize("dtype", [BF16, FLOAT32, FLOAT64], ids=str)
def test_product_topk_gives_ties_to_the_lowest_slot_when_scores_are_small_integers(
    num_tokens: int, num_heads: int, num_subkeys: int, width: int, top_k: int, dtype: torch.dtype, backend: Backend
) -> None:
    # Integers add up exactly in any order, so every tie is exact; with many tokens there are many of them.
    if not interpreted():
        num_tokens *= 10
    query = torch.randint(-1, 2, (num_tokens, num_heads, 2, width)).to(dtype)
    keys = torch.randint(-1, 2, (num_heads, 2, num_subkeys, width)).to(dtype)
    score_dtype = BF16 if dtype == BF16 else FLOAT32
    slot, weight = product_topk(query, keys, top_k, backend=backend, score_dtype=score_dtype)
    expected_slot, expected_score = oracle.product_key_topk(query.double(), keys.double(), top_k)
    assert torch.equal(slot, expected_slot)
    torch.testing.assert_close(weight.double(), expected_score.softmax(-1), rtol=1e-5, atol=1e-7)


@settings(
    max_examples=8 if interpreted() else 40,
    deadline=None,
    derandomize=False,
    database=None,
    # The backend does not change between examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 100), st.integers(1, 5)),
    top_k=st.integers(1, 9),
    spread=st.integers(0, 3),
    score_dtype=st.sampled_from([FLOAT32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_any_choice_among_small_integers_is_that_of_brute_force(
    sizes: tuple[int, int, int, int], top_k: int, spread: int, score_dtype: torch.dtype, seed: int, backend: Backend
) -> None:
    num_tokens, num_heads, num_subkeys, width = sizes
    top_k = min(top_k, num_subkeys)
    torch.manual_seed(seed)
    query = torch.randint(-spread, spread + 1, (num_tokens, num_heads, 2, width)).float()
    keys = torch.randint(-spread, spread + 1, (num_heads, 2, num_subkeys, width)).float()
    slot, _ = product_topk(query, keys, top_k, backend=backend, score_dtype=score_dtype)
    assert torch.equal(slot, topk_reference.select_slots(topk_reference.half_scores(query, keys), top_k))


def integer_halves(*sizes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, of small integers: equal keys have equal scores however they are added up."""
    query, keys = normal_halves(*sizes)
    return query.mul(4).round().to(dtype), keys.mul(4).round().to(dtype)


@pytest.mark.parametrize("num_subkeys", [9, 100])
@pytest.mark.parametrize("top_k", [1, 5, 9])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_product_topk_chooses_the_first_slots_when_all_keys_are_equal(
    num_subkeys: int, top_k: int, dtype: torch.dtype, backend: Backend
) -> None:
    query, keys = integer_halves(2, 2, num_subkeys, 3, dtype=dtype)
    slot, weight = product_topk(query, keys[:, :, :1].expand_as(keys), top_k, backend=backend)
    assert torch.equal(slot, torch.arange(top_k).expand(2, 2, top_k))
    torch.testing.assert_close(weight, torch.full_like(weight, 1 / top_k))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_product_topk_chooses_the_lowest_slots_when_half_the_keys_are_equal(
    dtype: torch.dtype, backend: Backend
) -> None:
    query, keys = integer_halves(4, 2, 9, 3, dtype=dtype)
    keys[:, 1] = keys[:, 1, :1]
    slot, _ = product_topk(query, keys, 5, backend=backend)
    assert torch.equal(slot, oracle.product_key_topk(query, keys, 5)[0])


@precisions
def test_product_topk_treats_signed_zeros_as_equal(
    dtype: torch.dtype, score_dtype: torch.dtype, backend: Backend
) -> None:
    # Scores of the first half are -0 and 0 in turn, those of the second all 0.
    query, keys = torch.zeros(1, 1, 2, 1, dtype=dtype), torch.ones(1, 2, 33, 1, dtype=dtype)
    query[0, 0, 1] = keys[0, 0, ::2] = -1
    keys[0, 1] = 0
    slot, _ = product_topk(query, keys, 3, backend=backend, score_dtype=score_dtype)
    assert slot.tolist() == [[[0, 1, 2]]]


@precisions
@normalisation
def test_replayed_slots_give_the_same_weights_and_gradients(
    dtype: torch.dtype, score_dtype: torch.dtype, normalised: bool, backend: Backend
) -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(3, 2, 7, 5, dtype))
    norm = torch.ones(5, dtype=dtype) if normalised else None
    options = {"backend": backend, "score_dtype": score_dtype, "query_norm": norm, "key_norm": norm}
    slot, weight = product_topk(query, keys, 4, **options)
    same_slot, same_weight = product_topk(query, keys, 4, slot.clone(), **options)
    assert torch.equal(slot, same_slot)
    assert torch.equal(weight, same_weight)
    grad = torch.randn_like(weight)
    first = torch.autograd.grad(weight, (query, keys), grad)
    again = torch.autograd.grad(same_weight, (query, keys), grad)
    assert all(map(torch.equal, first, again))


@precisions
def test_product_topk_takes_no_tokens(dtype: torch.dtype, score_dtype: torch.dtype, backend: Backend) -> None:
    query, keys = (half.requires_grad_() for half in normal_halves(0, 2, 5, 3, dtype))
    norm = torch.ones(3, dtype=dtype)
    for slot_index in (None, torch.zeros(0, 2, 4, dtype=torch.int64)):
        slot, weight = product_topk(
            query, keys, 4, slot_index, backend=backend, score_dtype=score_dtype, query_norm=norm
        )
        assert slot.shape == weight.shape == (0, 2, 4)
        keys.grad = None
        weight.sum().backward()
        assert query.grad.shape == query.shape
        assert torch.equal(keys.grad, torch.zeros_like(keys))


@pytest.mark.parametrize("score_dtype", [FLOAT32, BF16], ids=str)
def test_product_topk_chooses_the_same_in_chunks_and_at_once(
    score_dtype: torch.dtype, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randint(-2, 3, (130, 1, 2, 4)).float()
    keys = torch.randint(-2, 3, (1, 2, 5, 4)).float()
    norm = torch.rand(4)
    options = {"backend": backend, "score_dtype": score_dtype, "query_norm": norm}
    slot, weight = product_topk(query, keys, 2, **options)
    monkeypatch.setattr(native, "_CHUNK_SCORES", {"cpu": 70, "cuda": 70})
    if backend.is_triton:
        from mempar.kernels.product_topk import fused

        monkeypatch.setattr(fused, "_CHUNK_BYTES", 1)
    for slot_index in (None, slot):
        again, same_weight = product_topk(query, keys, 2, slot_index, **options)
        assert torch.equal(again, slot)
        torch.testing.assert_close(same_weight, weight, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    query, keys = normal_halves(2, 2, 5, 3, FLOAT32)
    wrong: list[tuple[dict, str]] = [
        ({"query": query[0]}, r"query is \[2, 2, 3\].*\[T, H, 2, Q\]"),
        ({"keys": keys[:1]}, r"keys is \[1, 2, 5, 3\].*H=2, Q=3"),
        ({"keys": keys.double()}, "keys is .*float64.*float32"),
        ({"query": query.half(), "keys": keys.half()}, "query is .*float16.*bfloat16"),
        ({"top_k": 6}, "top_k=6 with N=5"),
        ({"top_k": 0}, "top_k=0 with N=5"),
        ({"score_dtype": torch.float16}, "score_dtype=torch.float16"),
        ({"query_norm": torch.ones(2)}, r"query_norm is \[2\].*\[3\]"),
        ({"slot_index": torch.zeros(2, 2, 1, dtype=torch.int64)}, r"slot_index is \[2, 2, 1\].*\[2, 2, 2\]"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            product_topk(**{"query": query, "keys": keys, "top_k": 2, "backend": backend} | change)


def test_kernels_refuse_more_than_they_are_compiled_for() -> None:
    pytest.importorskip("triton")
    triton = Backend(name="triton")
    query, keys = normal_halves(1, 1, 8193, 1, FLOAT32)
    with pytest.raises(ValueError, match="at most 8192 sub-keys"):
        product_topk(query, keys, 2, backend=triton)
    with pytest.raises(ValueError, match="top_k=65 is more than the 64"):
        product_topk(query, keys[:, :, :100].contiguous(), 65, backend=triton)


@pytest.mark.parametrize("top_k", [1, 2, 5, 32, 33, 64])
def test_winning_pairs_are_those_that_few_precede(top_k: int, device: torch.device) -> None:
    first, second = winning_pairs(top_k, device)
    expected = [(a, b) for a in range(top_k) for b in range(top_k) if (a + 1) * (b + 1) <= top_k]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected
