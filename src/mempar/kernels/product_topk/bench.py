"""Contests of `product_topk`: scores and selection, forward and backward, in both precisions of scores."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.product_topk import product_topk


def contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the choice of slots with scores of the model's dtype and of float32, and its gradients.

    Args:
        shape: sizes.
        backend: what is measured.
        device: where.
        table_bytes: not looked at: no table is read.
    """
    halves = 2 * shape.heads
    query = torch.randn(shape.tokens, shape.heads, 2, shape.half_key, device=device).to(shape.dtype)
    keys = torch.randn(shape.heads, 2, shape.subkeys, shape.half_key, device=device).to(shape.dtype)
    # Scores near 1, as initial values give: a bf16 score is then within .02 of its neighbours.
    keys *= shape.half_key**-0.5
    flops = 2 * shape.tokens * halves * shape.subkeys * shape.half_key
    num_bytes = shape.value_bytes * (query.numel() + keys.numel()) + 12 * shape.tokens * shape.reads
    for score_dtype in dict.fromkeys((shape.dtype, torch.float32)):

        def choose(by: Backend, score_dtype: torch.dtype = score_dtype) -> tuple[Tensor, Tensor]:
            return product_topk(query, keys, shape.top_k, score_dtype=score_dtype, backend=by)

        yield Contest(
            name=f"product_topk, {str(score_dtype).removeprefix('torch.')} scores",
            ours=lambda choose=choose: choose(backend),
            # Weights, not slots: sums in another order decide ties and near ties otherwise.
            sample=lambda choose=choose: choose(backend)[1],
            truth=lambda choose=choose: choose(TORCH)[1],
            rivals={"torch einsum, topk": _plain(query, keys, shape.top_k)},
            num_bytes=num_bytes,
            num_flops=flops,
            tolerance=0.05 if score_dtype == torch.bfloat16 else 1e-3,
            inputs={"query": query, "keys": keys, "top_k": shape.top_k, "score_dtype": score_dtype},
        )
    leaves = query.clone().requires_grad_(), keys.clone().requires_grad_()
    grad = torch.randn(shape.tokens, shape.heads, shape.top_k, device=device)
    yield Contest(
        name="product_topk, forward + backward",
        ours=_with_gradients(leaves, grad, shape, backend),
        rivals={"torch": _with_gradients(leaves, grad, shape, TORCH)} if backend.is_triton else {},
        num_bytes=3 * num_bytes,
        num_flops=flops + 8 * shape.tokens * halves * shape.top_k * shape.half_key,
    )


def _plain(query: Tensor, keys: Tensor, top_k: int) -> Callable[[], Tensor]:
    """The same with torch's matmul and topk and all K * K sums; ties fall as they may."""
    num_subkeys = keys.shape[2]

    def choose() -> Tensor:
        best, index = torch.einsum("thsq,hsnq->sthn", query, keys).topk(top_k, -1)
        sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)
        slots = (index[0].unsqueeze(-1) * num_subkeys + index[1].unsqueeze(-2)).flatten(-2)
        score, chosen = sums.topk(top_k, -1)
        return torch.stack([slots.gather(-1, chosen).float(), score.float().softmax(-1)])

    return choose


def _with_gradients(
    leaves: tuple[Tensor, Tensor], grad: Tensor, shape: Shape, backend: Backend
) -> Callable[[], object]:
    def choose_and_differentiate() -> object:
        _, weight = product_topk(*leaves, shape.top_k, score_dtype=shape.dtype, backend=backend)
        return torch.autograd.grad(weight, leaves, grad)

    return choose_and_differentiate
