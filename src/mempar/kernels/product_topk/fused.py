"""Triton kernels of `product_topk`: scores, the best sub-keys of each half, the best slots and their weights.

Scores are made for a chunk of tokens at a time and never exist for a whole large batch. Beside them the largest score
of every group of neighbouring sub-keys is kept. The K best groups, by (largest score descending, group ascending), hold
the K best sub-keys by (score descending, sub-key ascending): were a sub-key's group not among them, the sub-key that
each of the K groups owes its largest score to would be better, or as good and lower. So only these groups are read
again.

Addresses are computed in 64 bits, no program writes what another one writes and nothing is atomic: results do not vary
from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempar.kernels.dispatch import interpreted
from mempar.kernels.product_topk.packing import index_of, last_unless, packed, score_of
from mempar.kernels.product_topk.pairs import winning_pairs

# Bytes of a chunk's scores. To be written takes 1 GB of scores .25 ms at 4.3 TB/s, beside a matmul of .35 ms (H200, 8B
# shape, by arithmetic); to keep chunks in the L2 cache would take 32 of them, whose launches take longer than that.
_CHUNK_BYTES = 128 << 20
# Sub-keys whose largest score is kept: at N=4096 and K=32 the groups and the K groups' sub-keys, 512 and 256, take the
# least sorting, and 16 bytes of bf16 are one load.
_GROUP = 8
# Sizes that differ from call to call must not compile kernels anew.
_VARYING = ("num_tokens", "num_rows")
# The largest sizes that kernels are compiled and tested for.
MOST_SUBKEYS, MOST_TOP_K = 8192, 64


@triton.jit
def rounded(score):
    """Float32 scores rounded to the nearest bf16, ties to even, as float32."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def softmax(score, inside):
    """Softmax of each row's scores `[ROWS, TOP]` that are inside."""
    score = tl.where(inside, score, float("-inf"))
    power = tl.exp(score - tl.max(score, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def _store_largest(
    largest_ptr,
    score,
    row,
    live,
    known,
    num_subkeys,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SUBKEYS: tl.constexpr,
):
    """Store the largest score of each group of a tile's sub-keys."""
    candidate = tl.where(known[None, :], score, float("-inf"))
    largest = tl.max(tl.reshape(candidate, [TOKENS, SUBKEYS // GROUP, GROUP]), 2)
    num_groups = tl.cdiv(num_subkeys, GROUP)
    group = tl.program_id(1) * (SUBKEYS // GROUP) + tl.arange(0, SUBKEYS // GROUP)
    place = largest_ptr + (row * num_groups)[:, None] + group[None, :]
    tl.store(place, largest.to(largest_ptr.dtype.element_ty), mask=live[:, None] & (group < num_groups)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def score_kernel(
    score_ptr,
    largest_ptr,
    inverse_rms_ptr,
    query_ptr,
    keys_ptr,
    num_tokens,
    num_lists,
    num_subkeys,
    width,
    score_stride,
    epsilon,
    NORMALISED: tl.constexpr,
    GROUPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Scores of a tile of tokens and sub-keys of one list (head and half), and the largest of each group."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    subkey = tl.program_id(1) * SUBKEYS + tl.arange(0, SUBKEYS)
    key_list = tl.program_id(2).to(tl.int64)
    row = token * num_lists + key_list
    key_row = key_list * num_subkeys + subkey
    live = token < num_tokens
    known = subkey < num_subkeys
    NARROW: tl.constexpr = score_ptr.dtype.element_ty == tl.bfloat16
    total = tl.zeros([TOKENS, SUBKEYS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for first in tl.range(0, width, DEPTH):
        column = first + tl.arange(0, DEPTH)
        inside = column < width
        query_place = query_ptr + (row * width)[:, None] + column[None, :]
        query = tl.load(query_place, mask=live[:, None] & inside[None, :], other=0)
        keys_place = keys_ptr + (key_row * width)[None, :] + column[:, None]
        keys = tl.load(keys_place, mask=inside[:, None] & known[None, :], other=0)
        if NORMALISED:
            wide = query.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        if INTERPRETED:
            # The interpreter multiplies bf16 wrongly.
            total = tl.dot(query.to(tl.float32), keys.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(query.to(keys.dtype), keys, total, input_precision="ieee")
    if NORMALISED:
        inverse_rms = 1 / tl.sqrt(squares / width + epsilon)
        total *= inverse_rms[:, None]
        tl.store(inverse_rms_ptr + row, inverse_rms, mask=live & (tl.program_id(1) == 0))
    if NARROW:
        # In the interpreter a conversion cuts digits off.
        total = rounded(total) if INTERPRETED else total.to(tl.bfloat16).to(tl.float32)
    if GROUPED:
        _store_largest(largest_ptr, total, row, live, known, num_subkeys, GROUP, TOKENS, SUBKEYS)
    score_place = score_ptr + (row * score_stride)[:, None] + subkey[None, :]
    tl.store(score_place, total.to(score_ptr.dtype.element_ty), mask=live[:, None] & known[None, :])


@triton.jit(do_not_specialize=_VARYING)
def select_kernel(
    best_ptr,
    score_ptr,
    largest_ptr,
    num_rows,
    num_subkeys,
    score_stride,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The TOP best sub-keys of ROWS rows (token, head and half), best first, packed in 64 bits.

    COLUMNS are groups or sub-keys.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    column = tl.arange(0, COLUMNS)
    NARROW: tl.constexpr = score_ptr.dtype.element_ty == tl.bfloat16
    if GROUPED:
        num_groups = tl.cdiv(num_subkeys, GROUP)
        known_group = live[:, None] & (column < num_groups)[None, :]
        largest = tl.load(largest_ptr + (row * num_groups)[:, None] + column[None, :], mask=known_group, other=0)
        number = last_unless(known_group, packed(largest.to(tl.float32), column[None, :], NARROW), NARROW)
        # A row that is not live has chosen nothing.
        group = tl.minimum(index_of(tl.topk(number, TOP), NARROW), num_groups - 1)
        subkey = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        known = live[:, None, None] & (subkey < num_subkeys)
        score = tl.load(score_ptr + (row * score_stride)[:, None, None] + subkey, mask=known, other=0)
        number = last_unless(known, packed(score.to(tl.float32), subkey, NARROW), NARROW)
        number = tl.reshape(number, [ROWS, TOP * GROUP])
    else:
        known = live[:, None] & (column < num_subkeys)[None, :]
        score = tl.load(score_ptr + (row * score_stride)[:, None] + column[None, :], mask=known, other=0)
        number = last_unless(known, packed(score.to(tl.float32), column[None, :], NARROW), NARROW)
    best = tl.topk(number, TOP)
    if NARROW:
        best = packed(score_of(best, True), index_of(best, True), False)
    tl.store(best_ptr + (row * TOP)[:, None] + tl.arange(0, TOP)[None, :], best, mask=live[:, None])


@triton.jit(do_not_specialize=_VARYING)
def combine_kernel(
    slot_ptr,
    weight_ptr,
    best_ptr,
    first_ptr,
    second_ptr,
    num_rows,
    num_subkeys,
    num_pairs,
    top_k,
    PAIRS: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The best slots and their weights of ROWS rows (token and head), from the pairs of ranks that can win."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < num_rows)[:, None]
    pair = tl.arange(0, PAIRS)
    exists = pair < num_pairs
    first = tl.load(first_ptr + pair, mask=exists, other=0)
    second = tl.load(second_ptr + pair, mask=exists, other=0)
    known = live & exists[None, :]
    halves = best_ptr + (row * (2 * TOP))[:, None]
    first = tl.load(halves + first[None, :], mask=known, other=0)
    second = tl.load(halves + TOP + second[None, :], mask=known, other=0)
    total = score_of(first, False) + score_of(second, False)
    slot = index_of(first, False) * num_subkeys + index_of(second, False)
    # A row that is not live has chosen slots, so that nothing is made of unwritten memory.
    chosen = tl.topk(last_unless(exists[None, :], packed(total, slot, False), False), TOP)
    rank = tl.arange(0, TOP)[None, :]
    inside = live & (rank < top_k)
    place = (row * top_k)[:, None] + rank
    tl.store(slot_ptr + place, index_of(chosen, False).to(tl.int64), mask=inside)
    tl.store(weight_ptr + place, softmax(score_of(chosen, False), rank < top_k), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def replay_kernel(
    weight_ptr,
    slot_ptr,
    score_ptr,
    num_rows,
    num_subkeys,
    score_stride,
    top_k,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weights of given slots of ROWS rows (token and head)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, TOP)[None, :]
    inside = (row < num_rows)[:, None] & (rank < top_k)
    place = (row * top_k)[:, None] + rank
    slot = tl.load(slot_ptr + place, mask=inside, other=0)
    halves = score_ptr + (row * 2 * score_stride)[:, None]
    first = tl.load(halves + slot // num_subkeys, mask=inside, other=0).to(tl.float32)
    second = tl.load(halves + score_stride + slot % num_subkeys, mask=inside, other=0).to(tl.float32)
    tl.store(weight_ptr + place, softmax(first + second, rank < top_k), mask=inside)


def choose(
    query: Tensor, keys: Tensor, top_k: int, epsilon: float | None, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose slots and weigh them; see `native.choose`."""
    num_tokens, num_heads, _, _ = query.shape
    num_subkeys = keys.shape[2]
    top = _power_of_two(top_k)
    slot_index = torch.empty(num_tokens, num_heads, top_k, dtype=torch.int64, device=query.device)
    weight = torch.empty_like(slot_index, dtype=torch.float32)
    inverse_rms = None if epsilon is None else query.new_empty(query.shape[:3], dtype=torch.float32)
    if not num_tokens:
        return slot_index, weight, inverse_rms
    narrow = score_dtype == torch.bfloat16
    grouped = num_subkeys > top * _GROUP
    best = torch.empty(num_tokens, num_heads, 2, top, dtype=torch.int64, device=query.device)
    for tokens in _chunks(num_tokens, num_heads, num_subkeys, score_dtype):
        scores, largest = _scores_into(inverse_rms, query, keys, tokens, epsilon, score_dtype, grouped=grouped)
        num_rows = (tokens.stop - tokens.start) * num_heads * 2
        columns = _power_of_two(triton.cdiv(num_subkeys, _GROUP) if grouped else num_subkeys)
        rows, num_warps = _sort_tile(max(columns, top * _GROUP) if grouped else columns, narrow=narrow)
        select_kernel[(triton.cdiv(num_rows, rows),)](
            best[tokens],
            scores,
            largest,
            num_rows,
            num_subkeys,
            scores.stride(2),
            GROUPED=grouped,
            GROUP=_GROUP,
            COLUMNS=max(columns, top),
            TOP=top,
            ROWS=rows,
            num_warps=num_warps,
        )
    first, second = winning_pairs(top_k, query.device)
    num_rows, num_pairs = num_tokens * num_heads, len(first)
    pairs = max(_power_of_two(num_pairs), top)
    rows, num_warps = _sort_tile(pairs, narrow=False)
    combine_kernel[(triton.cdiv(num_rows, rows),)](
        slot_index,
        weight,
        best,
        first,
        second,
        num_rows,
        num_subkeys,
        num_pairs,
        top_k,
        PAIRS=pairs,
        TOP=top,
        ROWS=rows,
        num_warps=num_warps,
    )
    return slot_index, weight, inverse_rms


def weigh(
    query: Tensor, keys: Tensor, slot_index: Tensor, epsilon: float | None, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weigh given slots; see `native.weigh`."""
    num_tokens, num_heads, top_k = slot_index.shape
    num_subkeys = keys.shape[2]
    weight = torch.empty_like(slot_index, dtype=torch.float32)
    inverse_rms = None if epsilon is None else query.new_empty(query.shape[:3], dtype=torch.float32)
    top = _power_of_two(top_k)
    rows, num_warps = _sort_tile(top, narrow=False)
    for tokens in _chunks(num_tokens, num_heads, num_subkeys, score_dtype):
        scores, _ = _scores_into(inverse_rms, query, keys, tokens, epsilon, score_dtype, grouped=False)
        num_rows = (tokens.stop - tokens.start) * num_heads
        replay_kernel[(triton.cdiv(num_rows, rows),)](
            weight[tokens],
            slot_index[tokens],
            scores,
            num_rows,
            num_subkeys,
            scores.stride(2),
            top_k,
            TOP=top,
            ROWS=rows,
            num_warps=num_warps,
        )
    return weight, inverse_rms


def _scores_into(
    inverse_rms: Tensor | None,
    query: Tensor,
    keys: Tensor,
    tokens: slice,
    epsilon: float | None,
    score_dtype: torch.dtype,
    *,
    grouped: bool,
) -> tuple[Tensor, Tensor]:
    """Score a chunk of tokens.

    Returns:
        `[t, H, 2, N']` scores, N rounded up to a whole group, and the `[t, H, 2, G]` largest of each group of sub-keys
        if grouped; writes the tokens' `inverse_rms`.
    """
    num_heads, _, num_subkeys, width = keys.shape
    query = query[tokens]
    num_tokens, num_groups = len(query), triton.cdiv(num_subkeys, _GROUP)
    scores = query.new_empty(num_tokens, num_heads, 2, num_groups * _GROUP, dtype=score_dtype)
    largest = query.new_empty(num_tokens, num_heads, 2, num_groups, dtype=score_dtype) if grouped else scores
    token_tile, subkey_tile, depth, num_warps = _score_tile(keys.dtype)
    score_kernel[(triton.cdiv(num_tokens, token_tile), triton.cdiv(num_subkeys, subkey_tile), num_heads * 2)](
        scores,
        largest,
        scores if inverse_rms is None else inverse_rms[tokens],
        query,
        keys,
        num_tokens,
        num_heads * 2,
        num_subkeys,
        width,
        scores.stride(2),
        0.0 if epsilon is None else epsilon,
        NORMALISED=epsilon is not None,
        GROUPED=grouped,
        INTERPRETED=interpreted(),
        GROUP=_GROUP,
        TOKENS=token_tile,
        SUBKEYS=subkey_tile,
        DEPTH=depth,
        num_warps=num_warps,
    )
    return scores, largest


def _chunks(num_tokens: int, num_heads: int, num_subkeys: int, score_dtype: torch.dtype) -> list[slice]:
    """Tokens whose scores are held at once."""
    token_bytes = num_heads * 2 * num_subkeys * score_dtype.itemsize
    at_once = max(128, _CHUNK_BYTES // token_bytes // 128 * 128)
    return [slice(start, min(start + at_once, num_tokens)) for start in range(0, num_tokens, at_once)]


def _score_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tokens, sub-keys and columns of a tile of scores, and its warps, for keys of a dtype."""
    return (128, 128, 64, 8) if dtype == torch.bfloat16 else (64, 64, 16, 4)


def _sort_tile(num_columns: int, *, narrow: bool) -> tuple[int, int]:
    """Rows of so many integers, narrow ones of 32 bits or of 64, that a program sorts, and its warps.

    Threads hold 16 of a row each; 8 where more of 64 bits would spill.
    """
    columns_a_warp = 32 * (16 if narrow or num_columns < 1024 else 8)
    num_warps = max(1, min(4, num_columns // columns_a_warp))
    return max(1, num_warps * columns_a_warp // num_columns), num_warps


def _power_of_two(number: int) -> int:
    """The next power of two, at least 2: sorts of less are not known to Triton."""
    return max(2, triton.next_power_of_2(number))
