"""`product_topk` of torch's own operators: what runs on CPUs, and for float64 everywhere.

Tokens are taken in chunks, so that the scores of all sub-keys never exist for a whole batch.
"""

import torch
from torch import Tensor

from mempar.kernels.product_topk.pairs import winning_pairs
from mempar.kernels.product_topk.stable import stable_topk

# Scores of a chunk of tokens: 64 MiB of float32 on a CPU, 256 MiB on a GPU.
_CHUNK_SCORES = {"cpu": 1 << 24, "cuda": 1 << 26}


def choose(
    query: Tensor, keys: Tensor, top_k: int, epsilon: float | None, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose slots and weigh them.

    Args:
        query: `[T, H, 2, Q]`.
        keys: `[H, 2, N, Q]`.
        top_k: K, at most N.
        epsilon: queries are divided by their root mean square, with this epsilon; None leaves them alone.
        score_dtype: what half scores are rounded to.

    Returns:
        `slot_index [T, H, K] int64`, the weights `[T, H, K]` and the inverse root mean squares `[T, H, 2]`.
    """
    slot_index = torch.empty(*query.shape[:2], top_k, dtype=torch.int64, device=query.device)
    weight, inverse_rms = _in_chunks(query, keys, slot_index, epsilon, score_dtype, choosing=True)
    return slot_index, weight, inverse_rms


def weigh(
    query: Tensor, keys: Tensor, slot_index: Tensor, epsilon: float | None, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weigh given slots `[T, H, K]`; the weights `[T, H, K]` and the inverse root mean squares `[T, H, 2]`."""
    return _in_chunks(query, keys, slot_index, epsilon, score_dtype, choosing=False)


def _in_chunks(
    query: Tensor, keys: Tensor, slot_index: Tensor, epsilon: float | None, score_dtype: torch.dtype, *, choosing: bool
) -> tuple[Tensor, Tensor | None]:
    num_subkeys, wide = keys.shape[2], _wide(query.dtype)
    weight = torch.empty_like(slot_index, dtype=wide)
    inverse_rms = None if epsilon is None else torch.empty(query.shape[:3], dtype=wide, device=query.device)
    at_once = max(1, _CHUNK_SCORES[query.device.type] // (2 * query.shape[1] * num_subkeys))
    keys = keys.to(wide)
    pairs = winning_pairs(slot_index.shape[2], query.device)
    for start in range(0, len(query), at_once):
        tokens = slice(start, start + at_once)
        inverse = None
        if epsilon is not None and inverse_rms is not None:
            inverse = query[tokens].to(wide).square().mean(-1).add_(epsilon).rsqrt_()
            inverse_rms[tokens] = inverse
        scores = half_scores(query[tokens], keys, inverse, score_dtype)
        if choosing:
            slot_index[tokens] = select_slots(scores, pairs, slot_index.shape[2], score_dtype)
        slots = slot_index[tokens]
        # [H, 2, t, K]: the sub-key of each half
        halves = torch.stack((slots // num_subkeys, slots % num_subkeys)).permute(2, 0, 1, 3)
        weight[tokens] = scores.gather(-1, halves).sum(1).transpose(0, 1).softmax(-1)
    return weight, inverse_rms


def half_scores(query: Tensor, keys: Tensor, inverse_rms: Tensor | None, score_dtype: torch.dtype) -> Tensor:
    """`[H, 2, T, N]` scores of all sub-keys, in float32 at least; `inverse_rms [T, H, 2]` scales them, if given."""
    wide = _wide(query.dtype)
    scores = query.to(wide).permute(1, 2, 0, 3) @ keys.to(wide).transpose(-1, -2)
    if inverse_rms is not None:
        scores *= inverse_rms.permute(1, 2, 0)[..., None]
    return scores.to(score_dtype).to(wide) if score_dtype == torch.bfloat16 else scores


def select_slots(scores: Tensor, pairs: tuple[Tensor, Tensor], top_k: int, score_dtype: torch.dtype) -> Tensor:
    """Return the `[T, H, K] int64` best slots, ordered by (score descending, slot ascending).

    Args:
        scores: `[H, 2, T, N]`, as `half_scores` returns them.
        pairs: of ranks, as `winning_pairs` returns them.
        top_k: K, at most N.
        score_dtype: what they were rounded to.
    """
    num_subkeys = scores.shape[-1]
    first, second = pairs
    # The stable way waits for the host, and is slow where many scores are equal; on a CPU it is the faster one
    # otherwise.
    if scores.dtype == torch.float64 or (scores.device.type == "cpu" and score_dtype != torch.bfloat16):
        best, index = stable_topk(scores, top_k)
        candidates = index[:, 0][..., first] * num_subkeys + index[:, 1][..., second]
        _, chosen = stable_topk(best[:, 0][..., first] + best[:, 1][..., second], top_k, tie_key=candidates)
        slots = candidates.gather(-1, chosen)
    else:
        best, index = packed_topk(scores, torch.arange(num_subkeys, device=scores.device), top_k)
        candidates = index[:, 0][..., first] * num_subkeys + index[:, 1][..., second]
        _, slots = packed_topk(best[:, 0][..., first] + best[:, 1][..., second], candidates, top_k)
    return slots.transpose(0, 1).contiguous()


def packed_topk(values: Tensor, number: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values and their numbers, ordered by (value descending, number ascending).

    A value's bits, in an order that integers share, and the complement of its number make one integer; so that equal
    values need no second look and the host does not wait.

    Args:
        values: `[..., N] float32`.
        number: `[..., N] int64`, below 2^31.
        top_k: k, at most N.

    Returns:
        Values and numbers `[..., k]`.
    """
    # Adding zero makes -0 equal to 0.
    bits = (values + 0.0).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    packed = bits.long().bitwise_left_shift_(32).bitwise_or_(0x7FFFFFFF - number)
    best, _ = torch.topk(packed, top_k)
    bits = (best >> 32).int()
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return value, 0x7FFFFFFF - (best & 0x7FFFFFFF)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
