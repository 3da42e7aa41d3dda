"""How tables are used, over all ranks: figures for metrics.jsonl every `usage_interval` steps of a memory.

Two things are counted. Every step marks the rows that it read (`memory.usage.RowHistory`, fed by the
optimizers, which know them anyway); from that come coverage and dead slots. In the step of the interval
lookups also go into a tally: from its reads come the skew over slots and over shards, from its weights
the entropy of each head. All tokens count that are looked up, masked ones too; each counts once,
whatever ranks hold copies of it and however often its layer is recomputed; evaluation does not count.

Sums travel in `parallel.read_counts` and in one reduction over the world, so that every rank, with a
table or without, ends up with the same figures.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.memory.usage import LookupTally, ReadSkew, entropy_figures, read_figures, read_skew, row_figures
from mempar.parallel.read_counts import count_reads
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers


class MemoryUsage:
    """Watches one memory of a run: all its tables are read at the same slots."""

    def __init__(
        self, name: str, run: RunConfig, world: World, model: Model, optimizers: Optimizers, since: int
    ) -> None:
        """Watch a memory.

        Args:
            name: of the memory; figures begin with it.
            run: the run.
            world: its ranks.
            model: whose lookups are tallied.
            optimizers: which keep the history of rows.
            since: see `UsageMonitor`.
        """
        self.name, self.config, self.since = name, run.memories[name], since
        self.world, self.optimizers = world, optimizers
        self.access = model.access.get(name)
        self.plan = world.placement.memories[name].plan
        self._place = list(run.memories).index(name)
        # Without sequence parallelism tensor-parallel ranks hold the same tokens: the first of them counts.
        self._counts_tokens = run.parallel.sequence_parallel or world.placement.grid.tp_rank(world.rank) == 0

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, is one of the interval."""
        return step % self.config.usage_interval == 0

    def watch(self, step: int) -> None:
        """Tally the lookups of a step that is due."""
        if self.is_due(step) and self._counts_tokens and self.access is not None:
            self.access.tally = self._new_tally()

    def report(self, step: int) -> dict[str, float]:
        """Join what the ranks counted; see `UsageMonitor.report`."""
        if not self.is_due(step):
            return {}
        window = min(self.config.usage_interval, step - self.since)
        sums = self._summed(self._counted_here(window))
        return {**self._row_figures(sums, window), **self._head_figures(sums)}

    def _new_tally(self) -> LookupTally:
        return LookupTally(self.config.layers, self.config.heads, self.world.device)

    def _counted_here(self, window: int) -> dict[str, Tensor]:
        """This rank's terms of the sums over the world; float64 is exact for integers up to 2^53."""
        tally, groups = self._new_tally(), self.world.groups
        rows, skew, shard_reads = [0, 0], [0.0] * 4, [0] * self.plan.num_row_shards
        if self.access is not None:
            assert groups is not None
            tally, self.access.tally = self.access.tally or tally, None
            member, copies = groups.memory.rank, groups.copies[self._place]
            counts = count_reads(*tally.reads(), self.plan, groups.memory, copies)
            shard_reads[self.plan.row_shard(member)] = counts.shard_reads
            found = read_skew(counts.histogram, self.config.num_slots)
            skew = [found.reads, found.busiest_slot_reads, found.busiest_share, found.effective_share]
            # Column shards and copies hold the same rows: the first of them speaks.
            if self.plan.column_shard(member) == 0 == copies.rank:
                history = self.optimizers.histories[self.name]
                rows = [history.rows_read_in(window), history.rows_never_read()]
        terms = {"rows": rows, "skew": skew, "shard_reads": shard_reads, "tokens": tally.tokens}
        wide = {name: torch.tensor(term, dtype=torch.float64) for name, term in terms.items()}
        return {**wide, "entropy": tally.entropy_sum.flatten().cpu()}

    def _summed(self, terms: dict[str, Tensor]) -> dict[str, list[float]]:
        flat = torch.cat(list(terms.values())).to(self.world.device)
        dist.all_reduce(flat)
        parts = flat.cpu().split([len(term) for term in terms.values()])
        return {name: part.tolist() for name, part in zip(terms, parts, strict=True)}

    def _row_figures(self, sums: dict[str, list[float]], window: int) -> dict[str, float]:
        read_rows, dead_rows = sums["rows"]
        reads, busiest_reads, busiest_share, effective_share = sums["skew"]
        skew = ReadSkew(
            reads=int(reads),
            busiest_slot_reads=int(busiest_reads),
            busiest_share=busiest_share,
            effective_share=effective_share,
        )
        shard_reads = sums["shard_reads"]
        figures = {
            **row_figures(read_rows, dead_rows, self.config.num_slots, window=window, since=self.since),
            **read_figures(skew),
            "shard_imbalance": max(shard_reads) * len(shard_reads) / reads,
        }
        return {f"{self.name}_{figure}": value for figure, value in figures.items()}

    def _head_figures(self, sums: dict[str, list[float]]) -> dict[str, float]:
        figures = entropy_figures(sums["entropy"], sums["tokens"], self.config)
        return {f"{self.name}_{figure}": value for figure, value in figures.items()}


class UsageMonitor:
    """Watches the memories of a run that have an interval.

    Attributes:
        memories: one watch each, in global order.
    """

    def __init__(
        self, run: RunConfig, world: World, model: Model, optimizers: Optimizers, since: dict[str, int]
    ) -> None:
        """Watch a run.

        Args:
            run: the run.
            world: its ranks.
            model: whose lookups are tallied.
            optimizers: which keep the histories of rows.
            since: for each memory the step after which its history begins: 0, unless the run continues a
                checkpoint that was saved without it.
        """
        self.memories = [
            MemoryUsage(name, run, world, model, optimizers, since[name])
            for name, memory in run.memories.items()
            if memory.usage_interval
        ]

    @property
    def since(self) -> dict[str, int]:
        """For each memory that is watched, the step after which its history begins."""
        return {memory.name: memory.since for memory in self.memories}

    def watch(self, step: int) -> None:
        """Prepare for a training step, counted from 1."""
        for memory in self.memories:
            memory.watch(step)

    def report(self, step: int) -> dict[str, float]:
        """Join what the ranks counted up to and in a step that is done; every rank must call it.

        Args:
            step: the number that was given to `watch`.

        Returns:
            Figures by name, equal on all ranks; none of memories that are not due.
        """
        return {name: value for memory in self.memories for name, value in memory.report(step).items()}


def usage_lines(figures: dict[str, float], run: RunConfig) -> list[str]:
    """A line for people about each memory that was reported.

    Args:
        figures: as returned by `UsageMonitor.report`.
        run: the run.
    """
    lines = []
    for name, memory in run.memories.items():
        if f"{name}_coverage" not in figures:
            continue
        entropies = [value for key, value in figures.items() if key.startswith(f"{name}_entropy/")]
        since = figures[f"{name}_dead_since_step"]
        lines.append(
            f"{name}: {figures[f'{name}_coverage']:.1%} of the slots read in {figures[f'{name}_coverage_steps']} "
            f"steps, {figures[f'{name}_dead_slots']} never{f' since step {since}' if since else ''} | "
            f"busiest 1% take {figures[f'{name}_busiest_percent_share']:.1%} of the reads | "
            f"busiest shard {figures[f'{name}_shard_imbalance']:.2f} of the mean | "
            f"head entropy {min(entropies):.2f} to {max(entropies):.2f} of {math.log(memory.top_k):.2f} nats"
        )
    return lines
