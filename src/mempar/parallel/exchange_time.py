"""Time of a memory layer's exchange on given links, from the bytes between every pair of members.

`exchange_calls` lists what a layer sends in one forward and one backward pass, collective by collective: the bytes of
cost.py, pair by pair (letters as there; a test compares the two). Each is priced by `all_to_alls_us`; the groups of a
hop are one collective here, because they run at once and share a node's way out. The time is that of the collectives
alone, from the moment the last member calls: routing, packing and gathering in between are no part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mempar.parallel.collective_time import all_to_alls_us, even_all_to_all_us
from mempar.parallel.cost import COUNT_BYTES, INDEX_BYTES, ExchangeBytes
from mempar.parallel.links import Topology
from mempar.parallel.shard_plan import ShardPlan

_VALUES = {1: ("values",), 2: ("values_inside", "values_across")}
_OUTPUT_GRADS = {1: ("output_grads",), 2: ("output_grads_across", "output_grads_inside")}
# The collectives of phase `entries`: row indices, how many a token has, weights.
_ENTRIES = ("rows", "counts", "weights")


@dataclass(frozen=True, kw_only=True)
class ExchangeCall:
    """One collective of an exchange.

    Attributes:
        phase: as in `cost.ExchangeBytes`.
        backward: whether it is part of the backward pass.
        sent_bytes: `[..., P, P]`, from member p to member q; nothing on the diagonal.
    """

    phase: str
    backward: bool
    sent_bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ExchangeUs:
    """Microseconds of the collectives of one forward and one backward pass of one memory layer.

    Phases are those of `cost.ExchangeBytes`; `forward` and `backward` add them up by pass, and what is computed again
    in backward counts there.
    """

    split_sizes: float
    entries: float
    values: float
    values_inside: float
    values_across: float
    output_grads: float
    output_grads_across: float
    output_grads_inside: float
    score_grads: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def exchange_calls(
    plan: ShardPlan,
    owned: list[list[int]] | np.ndarray,
    token_counts: list[int] | np.ndarray,
    *,
    reads: int,
    value_bytes: int,
    tokens_known: bool = True,
    hops: int = 1,
    merged: bool = False,
    products: bool = False,
    recomputed: bool = False,
) -> list[ExchangeCall]:
    """What the members of a memory-parallel group send each other, in actual counts.

    Args:
        plan: cuts of the table.
        owned: `n[r][i]`, entries of member r owned by row shard i, after merging: `[P, R]`, or `[..., P, R]` for
            many exchanges.
        token_counts: T_r of each member, `[..., P]`.
        reads: M.
        value_bytes: b, bytes of a value, a weight and a score gradient.
        tokens_known: whether every member knows the others' token counts beforehand.
        hops: hops of values and output gradients.
        merged: whether reads of a token that chose the same slot travel as one entry.
        products: whether rows of a second table are multiplied with the tokens too.
        recomputed: whether the layer is computed again in backward.

    Returns:
        The collectives in order.
    """
    rows = plan.num_row_shards
    row, column = np.arange(plan.num_shards) % rows, np.arange(plan.num_shards) // rows
    widths = np.array([plan.part_of(p).num_columns for p in range(plan.num_shards)])
    entries, tokens = np.asarray(owned)[..., row], np.asarray(token_counts)
    row_tokens = np.stack([tokens[..., i::rows].sum(-1) for i in range(rows)], -1)[..., row]
    # [..., p, q]: the sums at p of q's tokens, and of all tokens of q's row coordinate.
    sums = value_bytes * widths[:, None] * tokens[..., None, :]
    row_sums = value_bytes * widths[:, None] * row_tokens[..., None, :]
    inside, across = column[:, None] == column, row[:, None] == row
    counted = _is_counted(plan, merged)
    sizes = {
        "split_sizes": np.full_like(entries, COUNT_BYTES * (counted + (not tokens_known))),
        "rows": INDEX_BYTES * entries,
        "counts": np.broadcast_to(_count_bytes(reads) * tokens[..., None], entries.shape),
        "weights": value_bytes * entries,
        "values": sums,
        "values_inside": row_sums * inside,
        "values_across": sums * across,
        "score_grads": value_bytes * entries.swapaxes(-1, -2),
    }
    # Gradients go the way of the sums backwards.
    for name in _VALUES[hops]:
        sizes[name.replace("values", "output_grads")] = sizes[name].swapaxes(-1, -2)
    others = ~np.eye(plan.num_shards, dtype=bool)
    order = _order(counted, tokens_known=tokens_known, hops=hops, products=products, recomputed=recomputed)
    return [
        ExchangeCall(phase=_phase_of(name), backward=backward, sent_bytes=sizes[name] * others)
        for name, backward in order
    ]


def exchange_us(
    topology: Topology,
    plan: ShardPlan,
    members: Sequence[int],
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
) -> ExchangeUs:
    """Time of one layer's exchange, in actual counts.

    Args:
        topology: the links.
        plan: cuts of the table.
        members: world ranks of the memory-parallel group.
        owned: as in `exchange_calls`, and so are all that follow.
        token_counts: T_r of each member.
        reads: M.
        value_bytes: b.
        tokens_known: whether every member knows the others' token counts beforehand.
        hops: hops of values and output gradients.
        merged: whether reads are merged.
        products: whether there is a second table.
        recomputed: whether the layer is computed again in backward.
    """
    calls = exchange_calls(
        plan,
        owned,
        token_counts,
        reads=reads,
        value_bytes=value_bytes,
        tokens_known=tokens_known,
        hops=hops,
        merged=merged,
        products=products,
        recomputed=recomputed,
    )
    times = [float(all_to_alls_us(topology, members, call.sent_bytes)) for call in calls]
    return _added_up([(call.phase, call.backward, us) for call, us in zip(calls, times, strict=True)])


def even_exchange_us(
    topology: Topology,
    plan: ShardPlan,
    members: Sequence[int],
    tokens_per_rank: float,
    *,
    reads: int,
    value_bytes: int,
    duplicate_share: float = 0.0,
    tokens_known: bool = True,
    hops: int = 1,
    merged: bool = False,
    products: bool = False,
    recomputed: bool = False,
) -> ExchangeUs:
    """Time of one layer's exchange where members look up equally many tokens and reads are spread evenly.

    All shards count as the largest one, and entries as what a row shard is expected to own, `M T S_i / S`. The time to
    compute it grows with the number of members, not of pairs.

    Args:
        topology: the links.
        plan: cuts of the table.
        members: world ranks of the memory-parallel group.
        tokens_per_rank: T.
        reads: M.
        value_bytes: b.
        duplicate_share: share of reads that merging saves (`cost.duplicate_share`); not looked at unless merged.
        tokens_known: whether every member knows the others' token counts beforehand.
        hops: hops of values and output gradients.
        merged: whether reads are merged.
        products: whether there is a second table.
        recomputed: whether the layer is computed again in backward.
    """
    counted = _is_counted(plan, merged)
    part = plan.part_of(0)
    share = part.num_rows / plan.num_slots * (1.0 - duplicate_share * merged)
    entries, sums = reads * tokens_per_rank * share, value_bytes * part.num_columns * tokens_per_rank
    by_column = [members[start : start + plan.num_row_shards] for start in range(0, len(members), plan.num_row_shards)]
    by_row = [members[row :: plan.num_row_shards] for row in range(plan.num_row_shards)]
    pairs: dict[str, tuple[float, list[Sequence[int]]]] = {
        "split_sizes": (COUNT_BYTES * (counted + (not tokens_known)), [members]),
        "rows": (INDEX_BYTES * entries, [members]),
        "counts": (_count_bytes(reads) * tokens_per_rank, [members]),
        "weights": (value_bytes * entries, [members]),
        "score_grads": (value_bytes * entries, [members]),
        "values": (sums, [members]),
        "values_inside": (sums * plan.num_column_shards, by_column),
        "values_across": (sums, by_row),
    }
    pairs |= {name.replace("values", "output_grads"): pairs[name] for name in _VALUES[hops]}

    def time_of(name: str) -> float:
        num_bytes, groups = pairs[name]
        return max(even_all_to_all_us(topology, group, num_bytes) for group in groups)

    order = _order(counted, tokens_known=tokens_known, hops=hops, products=products, recomputed=recomputed)
    times = {name: time_of(name) for name, _ in order}
    return _added_up([(_phase_of(name), backward, times[name]) for name, backward in order])


def _is_counted(plan: ShardPlan, merged: bool) -> bool:
    """Whether a token's entries must be counted: with one row shard and nothing merged it has M for every member."""
    return plan.num_row_shards > 1 or merged


def _count_bytes(reads: int) -> int:
    return 1 if reads <= 255 else 2


def _phase_of(name: str) -> str:
    return "entries" if name in _ENTRIES else name


def _order(counted: bool, *, tokens_known: bool, hops: int, products: bool, recomputed: bool) -> list[tuple[str, bool]]:
    """Collectives of a forward and a backward pass, and whether they are part of the latter.

    A product travels as the backward pass of a read does, and its backward pass as a read.
    """
    find = ["split_sizes"] * (counted or not tokens_known) + ["rows"] + ["counts"] * counted
    out, back = ["weights", *_VALUES[hops]], [*_OUTPUT_GRADS[hops], "score_grads"]
    forward = find + out + back * products
    backward = forward * recomputed + out * products + back
    return [(name, False) for name in forward] + [(name, True) for name in backward]


def _added_up(times: list[tuple[str, bool, float]]) -> ExchangeUs:
    phases = {field.name: 0.0 for field in fields(ExchangeBytes)}
    passes = {False: 0.0, True: 0.0}
    for phase, backward, microseconds in times:
        phases[phase] += microseconds
        passes[backward] += microseconds
    return ExchangeUs(**phases, forward=passes[False], backward=passes[True])
