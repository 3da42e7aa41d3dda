"""Bytes that each phase of memory parallelism sends, in closed form.

Payload sent by one rank, what it keeps for itself excluded; the measured twin is ledger.py. Rank r
holds row shard i and column shard j of R x W = P. T_r tokens are looked up by r, T_sum by the group,
Tcol by the members of row coordinate i; n[r][i] entries of r are owned by row shard i, N_r is their sum
over i; D_j is the width of column shard j; b bytes a value, e an entry, s a score gradient, a a
per-token count.
"""

from dataclasses import dataclass

from mempar.parallel.shard_plan import ShardPlan

# Bytes of a row index on the wire (int32) and of one exchanged count (int64).
INDEX_BYTES = 4
COUNT_BYTES = 8
# Columns of a row that take its owners as long to read, differentiate and reduce as finding duplicates takes for one
# read: 35 ns against 1.3 ns a column. Measured on one busy core of an AMD EPYC with benchmarks/merging.py (float32,
# D=256 to 1024, 2026-11), 6 to 30 columns: near the end where merging surely pays.
MERGE_COLUMNS = 27


@dataclass(frozen=True, kw_only=True)
class ExchangeBytes:
    """Bytes that one rank sends in one forward and one backward pass of one memory layer.

    Values and output gradients go in one hop or in two: the phases of the other way are zero.
    """

    split_sizes: int
    entries: int
    values: int
    values_inside: int
    values_across: int
    output_grads: int
    output_grads_across: int
    output_grads_inside: int
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
    hops: int = 1,
    merged: bool = False,
    products: bool = False,
    recomputed: bool = False,
) -> ExchangeBytes:
    """Bytes sent by one member of a memory-parallel group.

    Args:
        plan: cuts of the table.
        rank: the member.
        owned: `n[r][i]`, entries of member r owned by row shard i, after merging.
        token_counts: T_r of each member.
        reads: M.
        value_bytes: b, bytes of a value, a weight and a score gradient.
        tokens_known: whether every member knows the others' token counts beforehand.
        hops: hops of values and output gradients.
        merged: whether reads of a token that chose the same slot travel as one entry.
        products: whether rows of a second table are multiplied with the tokens too.
        recomputed: whether the layer is computed again in backward.

    Returns:
        Bytes by phase.
    """
    members = range(plan.num_shards)
    others = [q for q in members if q != rank]
    widths = [end - start for start, end in map(plan.columns_of, members)]
    width, rows = widths[rank], plan.num_row_shards
    my_tokens, all_tokens = token_counts[rank], sum(token_counts)
    row_tokens = sum(token_counts[plan.row_shard(rank) :: rows])
    finds, outward, back = _trips(products=products, recomputed=recomputed)
    # With one row shard and nothing merged, every token has M entries for every member.
    fixed = rows == 1 and not merged
    per_token = 0 if fixed else (1 if reads <= 255 else 2)
    counts_sent = (not fixed) + (not tokens_known)
    sent_entries = sum(owned[rank][plan.row_shard(q)] for q in others)
    answered_entries = sum(owned[q][plan.row_shard(rank)] for q in others)
    one, two = hops == 1, hops == 2
    sums, grads = outward * value_bytes * width, back * value_bytes
    return ExchangeBytes(
        split_sizes=finds * COUNT_BYTES * counts_sent * len(others),
        entries=(finds * INDEX_BYTES + outward * value_bytes) * sent_entries
        + finds * per_token * my_tokens * len(others),
        values=one * sums * (all_tokens - my_tokens),
        values_inside=two * sums * (all_tokens - row_tokens),
        values_across=two * sums * (row_tokens - my_tokens),
        output_grads=one * grads * my_tokens * sum(widths[q] for q in others),
        output_grads_across=two * grads * my_tokens * (plan.value_dim - width),
        output_grads_inside=two * grads * row_tokens * width * (rows - 1),
        score_grads=grads * answered_entries,
    )


def _trips(*, products: bool, recomputed: bool) -> tuple[int, int, int]:
    """How often a step finds rows, sends weights out and sums back, and sends gradients out and scores back.

    A product travels as the backward pass of a read does, and its backward pass as a read.
    """
    return 1 + recomputed, 1 + products + recomputed, 1 + products * (1 + recomputed)


def forward_bytes_across(plan: ShardPlan, rank: int, *, reads: int, value_bytes: int, hops: int) -> int:
    """Bytes a token that a member sends to other column shards (across nodes) in a forward pass.

    Members look up equally many tokens. An entry goes to its row's owner in each other column shard,
    `e M (W - 1)`; sums go to all ranks of the other column shards, `b D_j (P - R)`, or with two hops to
    one of each, `b D_j (W - 1)`. Split sizes and per-token counts, a byte or so each, are left out.
    """
    others = plan.num_column_shards - 1
    start, end = plan.columns_of(rank)
    receivers = others * (plan.num_row_shards if hops == 1 else 1)
    return (INDEX_BYTES + value_bytes) * reads * others + value_bytes * (end - start) * receivers


def token_split_bytes(
    tp: int,
    num_tokens: int,
    *,
    value_dim: int,
    reads: int,
    value_bytes: int,
    score_bytes: int,
    vector_bytes: int = 0,
    recomputed: bool = False,
) -> tuple[int, int]:
    """Bytes sent by a tensor-parallel rank that looked up `num_tokens`: forward, then backward.

    Args:
        tp: ranks that hold the same tokens.
        num_tokens: of this rank's share.
        value_dim: D.
        reads: M.
        value_bytes: bytes of a value and of a product.
        score_bytes: bytes of a weight's gradient.
        vector_bytes: bytes of the numbers that rows of a second table are multiplied with; 0 without one.
        recomputed: whether the layer is computed again in backward.
    """
    outputs = value_bytes * (value_dim + (reads if vector_bytes else 0))
    gradients = score_bytes * reads + vector_bytes * value_dim
    return (tp - 1) * num_tokens * outputs * (1 + recomputed), (tp - 1) * num_tokens * gradients


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


def duplicate_share(*, heads: int, top_k: int, num_slots: int) -> float:
    """Share of reads that merging within a token saves, when heads choose evenly and independently.

    A head's K slots are distinct, so H heads are expected to choose `S (1 - (1 - K/S)^H)` slots with their
    H K reads, and the share is `1 - S (1 - (1 - K/S)^H) / (H K)`, about `(H - 1) K / (2 S)` for large tables.
    Heads that favour the same slots share more.
    """
    chosen = num_slots * (1.0 - (1.0 - top_k / num_slots) ** heads)
    return 1.0 - chosen / (heads * top_k)


def merging_pays(*, heads: int, top_k: int, num_slots: int, value_dim: int, num_row_shards: int) -> bool:
    """Whether `memory.merge_duplicates=auto` merges: `share D > 27`, and there are several row shards.

    A merged read saves its owners the work on a row of D columns, and costs what finding it among
    `1 / share` reads costs (see `MERGE_COLUMNS`); the bytes of an entry come on top. Column shards know
    counts and sizes only of unmerged entries: there merging would add a count a token and the host's wait.
    """
    share = duplicate_share(heads=heads, top_k=top_k, num_slots=num_slots)
    return num_row_shards > 1 and share * value_dim > MERGE_COLUMNS
