"""Recording steps on one rank: spans, actual counts, what was read of the tables."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.marks import Note, Span
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.model import Model
from mempar.runtime.profile.ceiling import Ceiling, measure_ceiling
from mempar.runtime.profile.collectives import WatchedCollectives
from mempar.runtime.profile.recording import Recording, ShardReads

# Groups whose links are tried out.
_TIMED = ("mp", "mp_inside", "mp_across", "copies", "tp", "pp", "dp", "ep")


class Recorder:
    """Records the steps that it is asked to, on this rank."""

    def __init__(self, world: World, model: Model) -> None:
        """Get ready; nothing is recorded yet.

        Args:
            world: its marks are turned on and off.
            model: its tables are watched too.
        """
        self.world, self.model = world, model
        grid = world.placement.grid
        self.groups = _process_groups(grid.tp, grid.cp)
        self.mark_us = world.marks.cost_us()
        # Of several names the first.
        names = {id(group): name for name, group in reversed(self.groups)}
        self._collectives = WatchedCollectives(world.marks, names)
        self._forget()

    @contextmanager
    def step(self, number: int, *, reads: bool = True) -> Iterator[None]:
        """Record a step; of one that fails nothing is kept, and nobody waits for the device.

        Args:
            number: of it.
            reads: whether rows that are read are counted, row by row, after it.
        """
        with self._watched_tables() if reads else nullcontext():
            self.world.marks.begin_step(number)
            began = time.perf_counter()
            try:
                with self._collectives:
                    yield
            except BaseException:
                self.world.marks.drop()
                raise
            self.world.marks.stop()
            # Before moments are converted, which is no part of the step.
            self._seconds.append(time.perf_counter() - began)
            spans, notes = self.world.marks.collect()
            self._spans += spans
            self._notes += notes

    @contextmanager
    def _watched_tables(self) -> Iterator[None]:
        for table in self.model.tables:
            table.shard.reads = []
        try:
            yield
            for table in self.model.tables:
                if table.shard.reads:
                    rows, counts = torch.unique(torch.cat(table.shard.reads), return_counts=True)
                    self._reads[table.name].append((rows.cpu(), counts.cpu()))
        finally:
            for table in self.model.tables:
                table.shard.reads = None

    def take(self, *, keep: bool = False) -> Recording:
        """Return what was recorded since the last call that did not keep it, or the beginning."""
        groups = {name: dist.get_world_size(group) for name, group in self.groups}
        if self.world.groups is not None:
            members = self.world.groups
            for group in (members.memory, members.inside, members.across, *members.copies):
                groups[group.name] = max(group.size, groups.get(group.name, 1))
        recording = Recording(
            rank=self.world.rank,
            seconds=self._seconds,
            mark_us=self.mark_us,
            group_sizes={name: size for name, size in groups.items() if size > 1},
            spans=self._spans,
            notes=self._notes,
            tables=[
                ShardReads(
                    table=table.name,
                    num_rows=table.shard.part.num_rows,
                    rows_by_reads=_rows_by_reads(self._reads[table.name]),
                )
                for table in self.model.tables
            ],
        )
        if not keep:
            self._forget()
        return recording

    def _forget(self) -> None:
        self._seconds: list[float] = []
        self._spans: list[Span] = []
        self._notes: list[Note] = []
        # Of each shard rows and how often they were read, step by step: nothing of the shard's size.
        self._reads: dict[str, list[tuple[Tensor, Tensor]]] = {table.name: [] for table in self.model.tables}

    def ceiling(self) -> list[Ceiling]:
        """What the links of the recorded groups carry at best; every rank must call it, outside of steps.

        Of the holders of copies those of the first memory stand for all: memories on other stages have other groups
        of that name, and members of one group must not call into different ones. Ranks without that memory's tables
        take part in none.
        """
        groups: dict[str, dist.ProcessGroup | None] = dict.fromkeys(_TIMED)
        for name, group in self.groups:
            if name in groups and dist.get_world_size(group) > 1:
                groups[name] = group
        if self.world.groups is not None:
            members = self.world.groups
            for member in (members.memory, members.inside, members.across, *members.copies[:1]):
                groups[member.name] = member.process_group if member.size > 1 else None
        largest: Counter[str] = Counter()
        for span in self._spans:
            largest[span.group] = max(largest[span.group], span.num_bytes)
        return measure_ceiling(groups, largest, self.world.device)


def _rows_by_reads(steps: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Pairs of a number of reads and the number of rows that were read so often, most reads first."""
    if not steps:
        return []
    read, places = torch.unique(torch.cat([rows for rows, _ in steps]), return_inverse=True)
    reads = torch.zeros(len(read), dtype=torch.int64).index_add_(0, places, torch.cat([count for _, count in steps]))
    counts, rows = torch.unique(reads, return_counts=True)
    return list(zip(counts.flip(0).tolist(), rows.flip(0).tolist(), strict=True))


def _process_groups(tp: int, cp: int) -> list[tuple[str, dist.ProcessGroup]]:
    """Megatron's groups of this rank and their names; several may have one name, and one may have several."""
    state = mcore.parallel_state
    found = [
        ("tp", state.get_tensor_model_parallel_group()),
        ("pp", state.get_pipeline_model_parallel_group()),
        ("dp", state.get_data_parallel_group()),
        ("cp", state.get_context_parallel_group()),
        # Of the same ranks as another where one size is 1, but a group of its own.
        ("dp_cp" if cp > 1 else "dp", state.get_data_parallel_group(with_context_parallel=True)),
        ("ep", state.get_expert_model_parallel_group()),
        ("tp_ep" if tp > 1 else "ep", state.get_expert_tensor_and_model_parallel_group()),
        ("expert_dp", state.get_expert_data_parallel_group()),
        ("embedding", state.get_embedding_group(check_initialized=False)),
        ("world", dist.group.WORLD),
    ]
    return [(name, group) for name, group in found if isinstance(group, dist.ProcessGroup)]
