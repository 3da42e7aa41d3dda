"""Bytes that each phase of memory parallelism sends, in closed form.

Payload sent by one rank, what it keeps for itself excluded; the measured twin is ledger.py. Rank r
holds row shard i and column shard j of R x W = P. T_r tokens are looked up by r, T_sum by the group;
n[r][i] entries of r are owned by row shard i, N_r is their sum over i; D_j is the width of column
shard j; b bytes a value, e an entry, s a score gradient, a a per-token count.
"""

from dataclasses import dataclass

from mempar.parallel.shard_plan import ShardPlan

# Bytes of a row index on the wire (int32) and of one exchanged count (int64).
INDEX_BYTES = 4
COUNT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ExchangeBytes:
    """Bytes that one rank sends in one forward and one backward pass of one memory layer."""

    split_sizes: int
    entries: int
    values: int
    output_grads: int
    score_grads: int


def exchange_bytes(
    plan: ShardPlan,
    rank: int,
    owned: list[list[int]],
    token_counts: list[int],
    *,
    reads: int,
    value_bytes: int,
    tokens_known: bool = True,
) -> ExchangeBytes:
    """Bytes sent by one member of a memory-parallel group.

    Args:
        plan: cuts of the table.
        rank: the member.
        owned: `n[r][i]`, entries of member r owned by row shard i.
        token_counts: T_r of each member.
        reads: M.
        value_bytes: b, bytes of a value, a weight and a score gradient.
        tokens_known: whether every member knows the others' token counts beforehand.

    Returns:
        Bytes by phase.
    """
    members = range(plan.num_shards)
    others = [q for q in members if q != rank]
    widths = [end - start for start, end in map(plan.columns_of, members)]
    my_tokens, all_tokens = token_counts[rank], sum(token_counts)
    entry_bytes = INDEX_BYTES + value_bytes
    per_token = 0 if plan.num_row_shards == 1 else (1 if reads <= 255 else 2)
    counts_sent = (plan.num_row_shards > 1) + (not tokens_known)
    sent_entries = sum(owned[rank][plan.row_shard(q)] for q in others)
    answered_entries = sum(owned[q][plan.row_shard(rank)] for q in others)
    return ExchangeBytes(
        split_sizes=COUNT_BYTES * counts_sent * len(others),
        entries=entry_bytes * sent_entries + per_token * my_tokens * len(others),
        values=value_bytes * widths[rank] * (all_tokens - my_tokens),
        output_grads=value_bytes * my_tokens * sum(widths[q] for q in others),
        score_grads=value_bytes * answered_entries,
    )


def token_split_bytes(
    tp: int, num_tokens: int, *, value_dim: int, reads: int, value_bytes: int, score_bytes: int
) -> tuple[int, int]:
    """Bytes sent by a tensor-parallel rank that looked up `num_tokens`: outputs, then score gradients."""
    return (tp - 1) * num_tokens * value_dim * value_bytes, (tp - 1) * num_tokens * reads * score_bytes


def copy_sync_bytes(num_copies: int, num_rows: int, *, num_columns: int, grad_bytes: int) -> int:
    """Bytes sent to sum the gradients of `num_rows` touched rows over `num_copies` holders."""
    if num_copies == 1:
        return 0
    return (num_copies - 1) * (COUNT_BYTES + num_rows * (INDEX_BYTES + grad_bytes * num_columns))


def add_by_key_bytes(num_members: int, num_pairs: int) -> int:
    """Bytes sent to add up pairs of int64 by key, of which `num_pairs` are meant for other members."""
    return COUNT_BYTES * (num_members - 1 + 2 * num_pairs)


def columns_send_fewer_bytes(*, value_dim: int, reads: int, value_bytes: int) -> bool:
    """Whether column shards send less than row shards, forward and backward: 2 D b > (e + s) M."""
    return 2 * value_dim * value_bytes > (INDEX_BYTES + 2 * value_bytes) * reads
