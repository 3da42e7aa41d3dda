"""Exact top-K of the product keys: the K best slots of each head out of S = N * N, and their softmax weights.

A slot's score is the sum of two half scores, so its two halves are among the K best of their half
(arXiv 1907.05242, section 3.1). Ties go to the lowest slot, and -0 equals 0. A half's best sub-keys are those of
(score descending, sub-key ascending), the slots those of (sum descending, slot ascending) among the pairs that are not
preceded by K others in both halves. That is the order of all S slots, but where rounding makes two sums equal that
differ. The backward pass is sparse: only the selected keys receive gradient, and no gradient `[T, H, N]` is made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.kernels.checks import check_device, check_range, require
from mempar.kernels.dispatch import Backend
from mempar.kernels.product_topk import native
from mempar.kernels.product_topk.backward import operand_gradients, score_gradient

SCORE_DTYPES = (torch.float32, torch.bfloat16)


def product_topk(
    query: Tensor,
    keys: Tensor,
    top_k: int,
    slot_index: Tensor | None = None,
    *,
    backend: Backend,
    score_dtype: torch.dtype = torch.float32,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Choose the K best slots of every token and head, and weigh them by a softmax over their scores.

    Args:
        query: `[T, H, 2, Q]`, of float64, float32 or bf16.
        keys: `[H, 2, N, Q]`, the dtype of `query`.
        top_k: K, at most N.
        slot_index: `[T, H, K] int64`: take these slots instead of choosing (a recorded run).
        backend: what computes it. Scores and choices of float64 are torch's with any.
        score_dtype: of the half scores: float32 (float64 for float64 queries), or bfloat16 (they are of bf16
            operands, summed in float32 and rounded to nearest); what follows is exact in float32 at least.
        query_norm: `[Q]`: queries are RMS-normalised, and weighted by this.
        key_norm: `[Q]`: keys likewise.
        norm_epsilon: epsilon of both norms.

    Returns:
        `slot_index [T, H, K] int64`, best first, and the weights `[T, H, K]`, in float32 at least; these are
        differentiable in `query`, `keys`, `query_norm` and `key_norm`.

    Raises:
        ValueError: shapes or dtypes do not fit, or are more than the backend can do.
        IndexError: a given slot is out of range; looked for if the backend checks indices.
    """
    _check(query, keys, top_k, slot_index, score_dtype, (query_norm, key_norm))
    check_device(query.device, keys=keys, slot_index=slot_index, query_norm=query_norm, key_norm=key_norm)
    if slot_index is not None:
        check_range("slot_index", slot_index, keys.shape[2] ** 2, backend)
    if _is_fused(query.dtype, score_dtype, backend):
        from mempar.kernels.product_topk import fused

        most = f"at most {fused.MOST_SUBKEYS} sub-keys under kernels.backend=triton (kernels.backend=torch takes more)"
        require(keys.shape[2] <= fused.MOST_SUBKEYS, "keys", keys, most)
        if top_k > fused.MOST_TOP_K:
            raise ValueError(
                f"top_k={top_k} is more than the {fused.MOST_TOP_K} that kernels.backend=triton can do; lower it, or "
                "use kernels.backend=torch."
            )
    keys = fold_norms(keys, query_norm, key_norm, norm_epsilon)
    epsilon = None if query_norm is None else norm_epsilon
    return _ProductTopk.apply(query, keys, top_k, slot_index, epsilon, score_dtype, backend)


def fold_norms(keys: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, norm_epsilon: float) -> Tensor:
    """Return the keys `[H, 2, N, Q]` whose products with normalised, unweighted queries are the scores.

    They are in float32 at least if there is a norm: a query's norm is one factor, which is applied to its scores, and
    the weights of both norms belong to the keys.
    """
    if query_norm is None and key_norm is None:
        return keys
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if key_norm is not None:
        keys = F.rms_norm(keys, keys.shape[-1:], key_norm.to(keys.dtype), norm_epsilon)
    return keys if query_norm is None else keys * query_norm.to(keys.dtype)


def _is_fused(dtype: torch.dtype, score_dtype: torch.dtype, backend: Backend) -> bool:
    """Whether Triton's kernels choose: they know half scores of float32 and bf16."""
    return backend.is_triton and (dtype != torch.float64 or score_dtype == torch.bfloat16)


def _check(
    query: Tensor,
    keys: Tensor,
    top_k: int,
    slot_index: Tensor | None,
    score_dtype: torch.dtype,
    norms: tuple[Tensor | None, ...],
) -> None:
    require(query.dim() == 4 and query.shape[2] == 2, "query", query, "the shape [T, H, 2, Q]")
    fits = keys.dim() == 4 and (*keys.shape[:2], keys.shape[3]) == tuple(query.shape[1:])
    num_heads, _, width = query.shape[1:]
    require(fits, "keys", keys, f"the shape [{num_heads}, 2, N, {width}], as the query has H={num_heads}, Q={width}")
    known = query.dtype in (torch.float64, torch.float32, torch.bfloat16)
    require(known, "query", query, "one of the dtypes float64, float32 and bfloat16")
    require(keys.dtype == query.dtype, "keys", keys, f"the dtype of query, {query.dtype}")
    if not 1 <= top_k <= keys.shape[2]:
        raise ValueError(f"top_k={top_k} with N={keys.shape[2]} sub-keys; it must be between 1 and N.")
    if score_dtype not in SCORE_DTYPES:
        raise ValueError(f"score_dtype={score_dtype} is not known; it is one of {', '.join(map(str, SCORE_DTYPES))}.")
    for name, norm in zip(("query_norm", "key_norm"), norms, strict=True):
        if norm is not None:
            require(norm.shape == (width,), name, norm, f"the shape [{width}]")
    if slot_index is not None:
        shape = (*query.shape[:2], top_k)
        fits = slot_index.shape == shape and slot_index.dtype == torch.int64
        require(fits, "slot_index", slot_index, f"the shape {list(shape)} and dtype int64")


class _ProductTopk(torch.autograd.Function):
    """Slots and their weights, with gradients that touch the selected keys only."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        top_k: int,
        slot_index: Tensor | None,
        epsilon: float | None,
        score_dtype: torch.dtype,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.dtypes = backend, (query.dtype, keys.dtype)
        kernels: Any = native
        if _is_fused(query.dtype, score_dtype, backend):
            from mempar.kernels.product_topk import fused

            kernels = fused
        if score_dtype == torch.bfloat16:
            query, keys = query.bfloat16(), keys.bfloat16()
        query, keys = query.contiguous(), keys.contiguous()
        if slot_index is None:
            slots, weight, inverse_rms = kernels.choose(query, keys, top_k, epsilon, score_dtype)
        else:
            slots = slot_index.contiguous()
            weight, inverse_rms = kernels.weigh(query, keys, slots, epsilon, score_dtype)
        ctx.save_for_backward(query, keys, slots, weight, inverse_rms)
        ctx.mark_non_differentiable(slots)
        return slots, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, slot_index, weight, inverse_rms = ctx.saved_tensors
        score_grad = score_gradient(weight, grad)
        wanted = ctx.needs_input_grad[:2]
        grads = operand_gradients(query, keys, slot_index, score_grad, inverse_rms, wanted, ctx.backend)
        narrowed = (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return *narrowed, None, None, None, None, None
