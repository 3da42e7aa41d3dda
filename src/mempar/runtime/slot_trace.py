"""Slot choices, recorded and replayed, whatever the layout.

A choice belongs to a (step, block, sample) and a position in the sequence. Ranks see different parts
of that: other samples (data parallel), other blocks (pipeline), other positions (sequence parallel).
A `SlotTrace` puts the parts together, so that a run in one layout can read the rows that a run in
another chose, and two runs can be compared choice by choice. The engine itself never needs it: tests, studies,
comparisons and `train.trace_steps` (slot_recording.py) put a `SlotTracer` into `TableAccess.hook_factory`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempar.memory.layer import SlotHook
from mempar.runtime.in_flight import Pass
from mempar.runtime.slot_file import UNKNOWN, TraceKey


class SlotTrace:
    """Choices of slots by step, block and sample.

    Plain numbers: it can be pickled, sent between processes and merged.

    Attributes:
        slots: for each key `[s, H, K] int32`, positions of the whole sequence, `UNKNOWN` where none was recorded.
    """

    def __init__(self) -> None:
        self.slots: dict[TraceKey, np.ndarray] = {}

    def record(self, key: TraceKey, part: np.ndarray, first: int, length: int) -> None:
        """Note the choices of some positions.

        Args:
            key: step, block and sample.
            part: `[positions, H, K]`.
            first: position of the first of them.
            length: s, positions of the whole sequence.

        Raises:
            ValueError: when another choice was noted for one of these positions.
        """
        if key not in self.slots:
            self.slots[key] = np.full((length, *part.shape[1:]), UNKNOWN, dtype=np.int32)
        place = self.slots[key][first : first + len(part)]
        known = place != UNKNOWN
        if not np.array_equal(place[known], part[known]):
            step, block, sample = key
            raise ValueError(
                f"step {step}, block {block}, sample {sample}: two ranks (or two passes) chose different slots for "
                "the same positions; copies of a token must choose alike."
            )
        place[...] = part

    def merge(self, other: "SlotTrace") -> "SlotTrace":
        """Add what another rank recorded; returns this trace.

        Raises:
            ValueError: when the two disagree, or one of their sequences has another length.
        """
        for key, slots in other.slots.items():
            mine = self.slots.setdefault(key, np.full_like(slots, UNKNOWN))
            if mine.shape != slots.shape:
                raise ValueError(f"{key} is {list(mine.shape)} in one trace and {list(slots.shape)} in the other.")
            recorded = slots != UNKNOWN
            both = recorded & (mine != UNKNOWN)
            if not np.array_equal(mine[both], slots[both]):
                raise ValueError(f"{key}: the traces chose different slots for the same positions.")
            mine[recorded] = slots[recorded]
        return self

    def unrecorded(self) -> list[TraceKey]:
        """Keys of sequences of which positions are missing."""
        return [key for key, slots in self.slots.items() if (slots == UNKNOWN).any()]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.slots)


class SlotTracer:
    """Hooks for one rank's memory layers that record what they choose, or replay what others chose.

    Assign it to `TableAccess.hook_factory`. Activations are `[positions, samples, C]` flattened with
    positions outermost; under sequence parallelism a rank holds an equal share of the positions.

    Attributes:
        step: number of the step that is being run; its user advances it.
        recorded: what this rank's layers read, replayed or not.
    """

    def __init__(
        self,
        *,
        shard: int = 0,
        num_shards: int = 1,
        replay: SlotTrace | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Stand between a rank's memory layers and its traces.

        Args:
            shard: this rank's share of the sequence (its tensor-parallel rank under sequence parallelism).
            num_shards: shares of the sequence; 1 where every rank holds it whole.
            replay: choices to read instead of choosing.
            device: where the layers compute.
        """
        self.step = 0
        self.recorded = SlotTrace()
        self.replay = replay
        self._shard, self._num_shards = shard, num_shards
        self._device = device

    @classmethod
    def for_run(cls, stepper: Any, tp_rank: int, replay: SlotTrace | None = None) -> "SlotTracer":
        """Trace the layers of a run.

        Args:
            stepper: the run's `Stepper`.
            tp_rank: this rank's tensor-parallel rank.
            replay: choices to read instead of choosing.
        """
        sizes = stepper.run.parallel
        return cls(
            shard=tp_rank if sizes.sequence_parallel else 0,
            num_shards=sizes.tp if sizes.sequence_parallel else 1,
            replay=replay,
            device=stepper.world.device,
        )

    def __call__(self, block: int, length: int, current: Pass) -> SlotHook:
        """Return the hook of one lookup.

        A pass that is repeated in backward is recorded again, and must choose as it did before.

        Args:
            block: 0-based number of the block.
            length: positions that this rank holds.
            current: whose samples are looked up.
        """
        samples = current.batch.sample_ids
        keys = [(self.step, block, sample) for sample in samples]
        first = self._shard * length

        def hook(slot_index: Tensor | None) -> Tensor | None:
            if slot_index is None:
                return self._replayed(keys, first, length)
            by_position = slot_index.detach().cpu().numpy().reshape(length, len(keys), *slot_index.shape[1:])
            for place, key in enumerate(keys):
                self.recorded.record(key, by_position[:, place], first, length * self._num_shards)
            return slot_index

        return hook

    def _replayed(self, keys: list[TraceKey], first: int, length: int) -> Tensor | None:
        """Slots `[length * samples, H, K] int64` of the recorded run; None when nothing is to be replayed."""
        if self.replay is None or not keys:
            return None
        missing = [key for key in keys if key not in self.replay.slots]
        if missing:
            raise ValueError(f"(step, block, sample) {missing} are not in the trace that is replayed.")
        parts = [self.replay.slots[key][first : first + length] for key in keys]
        slots = np.stack(parts, axis=1)
        if (slots == UNKNOWN).any():
            raise ValueError(f"the replayed trace lacks positions {first} to {first + length - 1} of one of {keys}.")
        return torch.from_numpy(slots.reshape(-1, *slots.shape[2:]).astype(np.int64)).to(self._device)
