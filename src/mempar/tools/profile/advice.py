"""Advice from a profile's own counts: other cuts of the tables, uneven shards, duplicate reads, hot rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import duplicate_share, exchange_bytes
from mempar.parallel.shard_plan import ShardPlan
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import MemoryPlacement, place
from mempar.runtime.profile.recording import Recording
from mempar.tools.profile.merge import merge_tables
from mempar.tools.profile.phases import phase_figures
from mempar.tools.profile.report import Report, TableReads

# Differences below these are not worth a change.
_FEWER_BYTES, _UNEVEN, _HOT_SHARE, _DUPLICATE_SHARE, _WAIT_SHARE = 1.1, 1.2, 0.2, 0.05, 0.1
# What a rank sends in a step of a phase that is for counts and sums.
_FEW_BYTES = 4096


def advice(run: RunConfig, recordings: Sequence[Recording], report: Report) -> Iterator[str]:
    """Say what the counts of a profile speak for.

    Args:
        run: resolved.
        recordings: of all ranks, in order.
        report: made of them.

    Yields:
        Sentences with the numbers that they are drawn from.
    """
    yield from _waiting(report)
    placement = place(run, len(recordings))
    for name, memory in run.memories.items():
        placed = placement.memories[name]
        if run.parallel.mp > 1:
            kept = _kept_share(memory, recordings) if placed.merge else 1.0
            yield cuts_advice(run, name, placed, _tokens(run, memory, recordings), kept=kept)
            yield from _merging(run, name, placed, recordings)
    for table in dict.fromkeys(reads.table for recording in recordings for reads in recording.tables):
        shards = [reads for reads in merge_tables(recordings) if reads.table == table]
        # Stages may have unequally many layers of a table.
        for stage in sorted({report.run.stage_of(shard.rank) for shard in shards}):
            yield from _uneven(table, [shard for shard in shards if report.run.stage_of(shard.rank) == stage])
        yield from _hot(table, shards)


def _waiting(report: Report) -> Iterator[str]:
    """Phases that take long and send next to nothing: what they take is the time until the last rank comes.

    Between stages that is the pipeline's own.
    """
    waits = {
        figures.phase: figures.us
        for figures in phase_figures(report)
        if figures.group != "pp" and figures.group and figures.sent_bytes < _FEW_BYTES
    }
    share = sum(waits.values()) / 1e6 / report.run.seconds_per_step
    if share > _WAIT_SHARE:
        most = max(waits, key=lambda phase: waits[phase])
        yield (
            f"ranks wait {share:.0%} of a step in collectives of a few bytes, most of it in {most}: for each other, "
            "not for links; look for a rank that is slower, or for cores that ranks share."
        )


def cuts_advice(run: RunConfig, name: str, placed: MemoryPlacement, tokens: list[int], *, kept: float = 1.0) -> str:
    """Compare the bytes that cuts of one memory's tables over the same ranks would send.

    Args:
        run: resolved.
        name: of the memory.
        placed: how its tables are cut.
        tokens: that each member of a memory-parallel group looks up at a time.
        kept: share of the reads that are left after merging, whatever the cut.
    """
    memory, mp = run.memories[name], run.parallel.mp
    tiles = -(-placed.plan.value_dim // memory.column_tile)
    cuts = [rows for rows in range(1, mp + 1) if mp % rows == 0 and mp // rows <= tiles]
    sent = {rows: _group_bytes(run, memory, placed, rows, tokens, kept) for rows in cuts}
    now = placed.plan.num_row_shards
    best = min(sent, key=lambda rows: (sent[rows], rows != now))
    where = f"at D={placed.plan.value_dim}, M={memory.heads * memory.top_k} reads a token and P={mp}"
    ratio = sent[now] / max(1, sent[best])
    if ratio < _FEWER_BYTES:
        worst = max(sent, key=lambda rows: sent[rows])
        more = sent[worst] / max(1, sent[now])
        than = f"; {_cut(worst, mp)} would send {more:.1f}x as many" if more > _FEWER_BYTES else ""
        return f"{name}: no other cut would send notably fewer bytes than {_cut(now, mp)} {where}{than}."
    return (
        f"{name}: {_cut(best, mp)} would send {ratio:.1f}x fewer bytes than {_cut(now, mp)} {where}; set "
        f"parallel.mp_rows={best}."
    )


def _group_bytes(
    run: RunConfig, memory: MemoryConfig, placed: MemoryPlacement, rows: int, tokens: list[int], kept: float
) -> int:
    """Bytes of all members in one forward and backward pass of one layer, reads falling evenly on row shards."""
    mp = len(tokens)
    plan: ShardPlan = replace(placed.plan, num_row_shards=rows, num_column_shards=mp // rows)
    reads = memory.heads * memory.top_k
    owned = [[int(count * reads * kept) // rows] * rows for count in tokens]
    return sum(
        sum(
            vars(
                exchange_bytes(
                    plan,
                    rank,
                    owned,
                    tokens,
                    reads=reads,
                    value_bytes=run.value_bytes_of(memory),
                    hops=run.parallel.mp_hops if 1 < rows < mp else 1,
                    merged=placed.merge,
                    products=memory.variant == "peer",
                    recomputed=run.train.runs_memory_again,
                )
            ).values()
        )
        for rank in range(mp)
    )


def _cut(rows: int, mp: int) -> str:
    if rows == 1:
        return "columns"
    return "rows" if rows == mp else f"a grid of {rows} x {mp // rows}"


def _tokens(run: RunConfig, memory: MemoryConfig, recordings: Sequence[Recording]) -> list[int]:
    """Tokens of one lookup of each member of the first memory-parallel group that has this memory."""
    found = []
    for recording in recordings:
        lookups = [note.counts[0] for note in recording.notes if note.name == "owned" and note.layer in memory.layers]
        if lookups:
            found.append(max(lookups))
    return found[: run.parallel.mp]


def _merging(run: RunConfig, name: str, placed: MemoryPlacement, recordings: Sequence[Recording]) -> Iterator[str]:
    """Duplicate reads within a token: those that were merged, or those that are to be expected."""
    memory = run.memories[name]
    reads = {"heads": memory.heads, "top_k": memory.top_k, "num_slots": memory.num_slots}
    if not placed.merge:
        expected = duplicate_share(**reads)
        if expected >= _DUPLICATE_SHARE and placed.plan.num_row_shards > 1:
            yield f"{name}: {expected:.0%} of reads are expected twice in a token; try memory.merge_duplicates=on."
        return
    saved = 1 - _kept_share(memory, recordings)
    if saved < _DUPLICATE_SHARE:
        yield f"{name}: merging duplicates saves {saved:.1%} of reads; try memory.merge_duplicates=off."
    else:
        yield f"{name}: merging duplicates saves {saved:.1%} of reads."


def _kept_share(memory: MemoryConfig, recordings: Sequence[Recording]) -> float:
    """Entries that travelled, of the reads that tokens chose; 1 if there were none."""
    notes = [
        note.counts
        for recording in recordings
        for note in recording.notes
        if note.name == "owned" and note.layer in memory.layers
    ]
    reads = sum(tokens for tokens, *_ in notes) * memory.heads * memory.top_k
    return sum(sum(owned) for _, *owned in notes) / reads if reads else 1.0


def _uneven(table: str, shards: list[TableReads]) -> Iterator[str]:
    served = [shard.rows_read for shard in shards]
    mean = sum(served) / len(served)
    if len(shards) > 1 and mean and max(served) > _UNEVEN * mean:
        most = max(shards, key=lambda shard: shard.rows_read)
        yield (
            f"{table}: rank {most.rank} serves {max(served) / mean:.1f}x the reads of a shard's mean; row shards wait "
            "for it. memory.balance_loss evens out which slots are read; columns share the reads of every row."
        )


def _hot(table: str, shards: list[TableReads]) -> Iterator[str]:
    total = sum(shard.rows_read for shard in shards)
    hot = sum(shard.top_share * shard.rows_read for shard in shards) / max(1, total)
    if hot > _HOT_SHARE:
        unique = sum(shard.unique_rows for shard in shards) / sum(shard.num_rows for shard in shards)
        yield (
            f"{table}: the 1% of rows that are read most take {hot:.0%} of the reads; {unique:.0%} of all rows were "
            "read in the measured steps."
        )
