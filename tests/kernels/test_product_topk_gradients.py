"""Gradients of product-key top-K, normalised and not."""

import pytest
import torch
from torch import Tensor

import oracle
from halves import BF16, FLOAT32, FLOAT64, normal_halves, normalisation, topk_shapes
from mempar.kernels.dispatch import Backend
from mempar.kernels.product_topk import backward, product_topk
from mempar.kernels.product_topk import reference as topk_reference
from mempar.kernels.product_topk.backward import operand_gradients, score_gradient


@normalisation
def test_product_topk_passes_gradcheck(normalised: bool, backend: Backend) -> None:
    query, keys = normal_halves(2, 1, 3, 2)
    norms = [torch.rand(2, dtype=FLOAT64).add(0.5).requires_grad_() for _ in range(2 if normalised else 0)]

    def weights(
        query: Tensor, keys: Tensor, query_norm: Tensor | None = None, key_norm: Tensor | None = None
    ) -> Tensor:
        return product_topk(query, keys, 3, backend=backend, query_norm=query_norm, key_norm=key_norm)[1]

    # Differences of 1e-6 do not flip a slot unless two scores are that close.
    assert torch.autograd.gradcheck(weights, (query.requires_grad_(), keys.requires_grad_(), *norms))


@pytest.mark.parametrize("which", [0, 1])
def test_queries_or_keys_alone_can_be_normalised(which: int, backend: Backend) -> None:
    query, keys = normal_halves(4, 2, 9, 5)
    norms: list[Tensor | None] = [None, None]
    norms[which] = torch.rand(5, dtype=FLOAT64)
    _, weight = product_topk(query, keys, 3, backend=backend, query_norm=norms[0], key_norm=norms[1])
    normalised = (topk_reference.normalised(half, norm, 1e-5) for half, norm in zip((query, keys), norms, strict=True))
    _, score = oracle.product_key_topk(*normalised, 3)
    torch.testing.assert_close(weight, score.softmax(-1), rtol=0, atol=1e-12)


@topk_shapes
@normalisation
@pytest.mark.parametrize("dtype", [BF16, FLOAT32, FLOAT64], ids=str)
def test_gradients_match_those_of_the_reference(
    num_tokens: int,
    num_heads: int,
    num_subkeys: int,
    width: int,
    top_k: int,
    normalised: bool,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    # Replayed, as the choice itself has no gradient: slots that are not the best, and repeat.
    slot = torch.randint(num_subkeys**2, (num_tokens, num_heads, top_k))
    halves = [half.requires_grad_() for half in normal_halves(num_tokens, num_heads, num_subkeys, width, dtype)]
    norms = [torch.rand(width).add(0.5).to(dtype).requires_grad_() for _ in range(2 if normalised else 0)]
    options = dict(zip(("query_norm", "key_norm"), norms, strict=False))
    used, weight = product_topk(*halves, top_k, slot, backend=backend, **options)
    assert torch.equal(used, slot)
    wide = [tensor.detach().double().requires_grad_() for tensor in (*halves, *norms)]
    expected = topk_reference.slot_weights(topk_reference.half_scores(*wide), slot)
    # Scores grow with the width, and what rounds them moves the weights by as much.
    tolerance = {FLOAT64: 1e-11, FLOAT32: 2e-5, BF16: 2e-2}[dtype]
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=min(tolerance, 2e-5))
    grad = torch.randn_like(weight)
    ours = torch.autograd.grad(weight, (*halves, *norms), grad)
    truth = torch.autograd.grad(expected, wide, grad.double())
    for one, other, operand in zip(ours, truth, (*halves, *norms), strict=True):
        assert one.dtype == operand.dtype
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance * max(1, float(other.abs().max()))
        )


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_product_topk_gives_no_gradient_to_unselected_keys(dtype: torch.dtype, backend: Backend) -> None:
    query, keys = normal_halves(2, 2, 20, 3, dtype)
    keys.requires_grad_()
    slot, weight = product_topk(query, keys, 3, backend=backend)
    (weight * torch.arange(3)).sum().backward()
    assert keys.grad is not None
    for head in range(2):
        for half, index in enumerate((slot[:, head] // 20, slot[:, head] % 20)):
            touched = keys.grad[head, half].abs().sum(-1) > 0
            # A sub-key of all slots that a token chose has none either: a softmax does not change with what they share.
            shared = {int(chosen[0]) for chosen in index if len(chosen.unique()) == 1}
            chosen = set(index.flatten().tolist())
            assert chosen - shared <= set(touched.nonzero().squeeze(1).tolist()) <= chosen


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_wants_are_not_made(wanted: tuple[bool, bool], backend: Backend) -> None:
    query, keys = normal_halves(2, 1, 4, 3)
    slot, weight = product_topk(query, keys, 2, backend=backend)
    score_grad = score_gradient(weight, torch.randn_like(weight))
    grads = operand_gradients(query, keys, slot, score_grad, None, wanted, backend)
    assert tuple(grad is not None for grad in grads) == wanted


@pytest.mark.parametrize("piece_entries", [1, 3, 7])
@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_of_hot_sub_keys_are_summed_in_pieces(
    piece_entries: int, normalised: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys = normal_halves(9, 2, 6, 3, FLOAT32)
    # Most tokens choose the first sub-key of the first head, some sub-keys are chosen by none.
    keys[0, :, 0] = query[:, 0].mean(0) * 10
    slots = torch.randint(4, (9, 2, 4))
    slots[:, 0] = 0
    score_grad = torch.randn(9, 2, 4)
    inverse_rms = torch.rand(9, 2, 2) + 0.5 if normalised else None
    whole = operand_gradients(query, keys, slots, score_grad, inverse_rms, (True, True), backend)
    monkeypatch.setattr(backward, "PIECE_ENTRIES", piece_entries)
    pieces = operand_gradients(query, keys, slots, score_grad, inverse_rms, (True, True), backend)
    for one, other in zip(pieces, whole, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
