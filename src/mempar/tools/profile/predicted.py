"""Bytes that the formulas of parallel/cost.py predict for recorded steps, in the counts that ranks noted on the way.

The counts are of tokens, entries by row shard, and touched rows. What was sent is measured elsewhere, from tensors.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mempar.marks import Note
from mempar.memory.config import MemoryConfig
from mempar.parallel.cost import copy_sync_bytes, exchange_bytes, token_split_bytes
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import place
from mempar.runtime.profile.recording import Recording

TRAINING_BYTES = {"float64": 8, "float32": 4, "bf16": 2}
# Phases that have a formula, and whose collectives they are.
PREDICTED = {
    **dict.fromkeys(("split_sizes", "entries", "values", "output_grads", "score_grads"), "mp"),
    **dict.fromkeys(("values_inside", "output_grads_inside"), "mp_inside"),
    **dict.fromkeys(("values_across", "output_grads_across"), "mp_across"),
    **dict.fromkeys(("token_gather", "score_gather"), "tp"),
    "copy_sync": "copies",
}


@dataclass(frozen=True, kw_only=True)
class PhaseKey:
    """One phase of one layer in one step on one rank; layer -1 is the step's own."""

    rank: int
    step: int
    layer: int
    phase: str


def predicted_bytes(run: RunConfig, recordings: Sequence[Recording]) -> Counter[PhaseKey]:
    """Predict what every rank sends.

    Args:
        run: resolved.
        recordings: of all ranks, in order.

    Returns:
        Bytes by phase; what is nothing may be left out.
    """
    return _Prediction(run, recordings).total()


class _Prediction:
    def __init__(self, run: RunConfig, recordings: Sequence[Recording]) -> None:
        self.run = run
        self.placement = place(run, len(recordings))
        self.grid = self.placement.grid
        self.groups = self.grid.memory_groups(self.placement.table_stages)
        self.layers = {layer: name for name, memory in run.memories.items() for layer in memory.layers}
        self.noted: list[dict[str, list[Note]]] = []
        for recording in recordings:
            by_name: dict[str, list[Note]] = defaultdict(list)
            for note in recording.notes:
                by_name[note.name].append(note)
            self.noted.append(by_name)

    def total(self) -> Counter[PhaseKey]:
        total: Counter[PhaseKey] = Counter()
        for group in self.groups:
            for rank in group:
                for key, num_bytes in (*self._exchanges(rank, group), *self._splits(rank), *self._copies(rank, group)):
                    total[key] += num_bytes
        return total

    def _widths(self, memory: MemoryConfig) -> dict[str, Any]:
        return {"reads": memory.heads * memory.top_k, "value_bytes": self.run.value_bytes_of(memory)}

    def _exchanges(self, rank: int, group: list[int]) -> Iterator[tuple[PhaseKey, int]]:
        """Phases of every lookup; the members' counts of one lookup belong together."""
        lookups = [
            {(note.step, note.layer, note.micro_batch): note.counts for note in self.noted[member]["owned"]}
            for member in group
        ]
        for lookup in lookups[group.index(rank)]:
            step, layer, _ = lookup
            name = self.layers[layer]
            memory, placed = self.run.memories[name], self.placement.memories[name]
            counts = [member[lookup] for member in lookups]
            phases = exchange_bytes(
                placed.plan,
                group.index(rank),
                [list(owned) for _, *owned in counts],
                [tokens for tokens, *_ in counts],
                hops=self.run.parallel.mp_hops,
                merged=placed.merge,
                products=memory.variant == "peer",
                recomputed=self.run.train.runs_memory_again,
                **self._widths(memory),
            )
            for phase, num_bytes in vars(phases).items():
                yield PhaseKey(rank=rank, step=step, layer=layer, phase=phase), num_bytes

    def _splits(self, rank: int) -> Iterator[tuple[PhaseKey, int]]:
        """What tensor-parallel ranks with the same tokens send each other."""
        dtype = self.run.train.dtype
        for note in self.noted[rank]["split"]:
            memory = self.run.memories[self.layers[note.layer]]
            forward, backward = token_split_bytes(
                self.run.parallel.tp,
                note.counts[0],
                value_dim=self.run.value_dim_of(memory),
                # Scores are in float32 at least, and in the training dtype whatever the table's.
                score_bytes=max(4, TRAINING_BYTES[dtype]),
                vector_bytes=TRAINING_BYTES[dtype] if memory.variant == "peer" else 0,
                recomputed=self.run.train.runs_memory_again,
                **self._widths(memory),
            )
            yield PhaseKey(rank=rank, step=note.step, layer=note.layer, phase="token_gather"), forward
            yield PhaseKey(rank=rank, step=note.step, layer=note.layer, phase="score_gather"), backward

    def _copies(self, rank: int, group: list[int]) -> Iterator[tuple[PhaseKey, int]]:
        """What the holders of one shard send each other: each step notes touched rows, table by table."""
        stage = self.grid.stage_of(rank)
        here = {name: placed for name, placed in self.placement.memories.items() if stage in placed.stages}
        tables = [name for name in here for _ in self.run.memories[name].table_names]
        by_step: dict[int, list[int]] = defaultdict(list)
        for note in self.noted[rank]["touched"]:
            by_step[note.step] += note.counts
        for step, touched in by_step.items():
            for name, num_rows in zip(tables, touched, strict=True):
                start, end = here[name].plan.columns_of(group.index(rank))
                num_copies = sum(self.grid.stage_of(ranks[0]) in here[name].stages for ranks in self.groups)
                value_bytes = self.run.value_bytes_of(self.run.memories[name])
                sent = copy_sync_bytes(num_copies, num_rows, num_columns=end - start, grad_bytes=max(4, value_bytes))
                yield PhaseKey(rank=rank, step=step, layer=-1, phase="copy_sync"), sent
