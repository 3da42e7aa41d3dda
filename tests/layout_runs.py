"""Runs of the layout law: layouts and their single-process references, started ahead of their tests.

References are run once a configuration. `LayoutRuns` knows the order of the tests that were asked
for, and keeps the pool busy with the next ones while a test compares.
"""

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from layout_cases import Case
from mempar.memory import layer as memory_layer
from mempar.runtime.config import RunConfig
from mempar.runtime.in_flight import Pass
from mempar.runtime.slot_trace import SlotTrace, TraceKey
from oracle import rms_norm, slot_scores
from rank_pool import Job, RankPool
from toy import History, Seen, Session, joined, train

STEPS = 20
# Cases that are started before their turn, and those whose references are.
CASES_AHEAD, REFERENCES_AHEAD = 4, 12


def train_reference(run: RunConfig, steps: int) -> Seen:
    """Train in a single process; note in the first step how close each choice was.

    `extra["gaps"]` has for each (step, block, sample) `[s, H]`: the score that the last slot chosen is
    ahead of the best slot left out, as a share of the spread of all slots' scores.
    """
    choose = memory_layer.product_topk
    gaps: dict[TraceKey, np.ndarray] = {}

    def observe(session: Session, seen: Seen) -> None:
        seen.extra["gaps"] = gaps

        def probe(
            query: Tensor, keys: Tensor, top_k: int, slot_index: Tensor | None = None, **options: Any
        ) -> tuple[Tensor, Tensor]:
            if session.tracer.step == 0:
                with torch.no_grad():
                    epsilon = options["norm_epsilon"]
                    norms = (options["query_norm"], options["key_norm"])
                    normalised = (
                        half if norm is None else rms_norm(half, norm, epsilon)
                        for half, norm in zip((query, keys), norms, strict=True)
                    )
                    score = slot_scores(*normalised)
                best = score.topk(top_k + 1).values
                probe.gap = ((best[..., -2] - best[..., -1]) / (score.amax(-1) - score.amin(-1))).numpy()
            return choose(query, keys, top_k, slot_index, **options)

        def factory(block: int, length: int, current: Pass) -> Any:
            samples = current.batch.sample_ids
            trace = session.tracer(block, length, current)

            def hook(slot_index: Tensor | None) -> Tensor | None:
                if slot_index is not None and session.tracer.step == 0:
                    by_position = probe.gap.reshape(length, len(samples), -1)
                    gaps.update({(0, block, sample): by_position[:, i] for i, sample in enumerate(samples)})
                return trace(slot_index)

            return hook

        memory_layer.product_topk = probe
        session.model.hook_slots(factory)

    with patch.object(memory_layer, "product_topk", choose):
        return train(run, steps, keep=("gradients", "slots"), observe=observe)


def flipped(trace: SlotTrace, reference: SlotTrace, step: int) -> list[tuple[TraceKey, int, int]]:
    """(key, position, head) of every choice of another set of slots than the reference's."""
    found = []
    for key, slots in reference.slots.items():
        if key[0] == step and key in trace.slots:
            differ = (np.sort(trace.slots[key], -1) != np.sort(slots, -1)).any(-1)
            found += [(key, int(position), int(head)) for position, head in np.argwhere(differ)]
    return found


class LayoutRuns:
    """Runs and their results, each made once."""

    def __init__(self, pool: RankPool, order: Sequence[Case]) -> None:
        self.pool, self.order = pool, list(order)
        self._jobs: dict[Any, Job] = {}
        self._histories: dict[int, History] = {}

    def reference(self, case: Case) -> History:
        """The single process's history of a case."""
        return self._history(self._start_reference(case), case.single)

    def history(self, case: Case) -> History:
        """The history of a case's layout; the next cases are started too."""
        place = self.order.index(case)
        for ahead in self.order[place : place + REFERENCES_AHEAD]:
            self._start_reference(ahead)
        for ahead in self.order[place : place + CASES_AHEAD]:
            self._start(ahead)
        return self._history(self._start(case), case.run)

    def _start_reference(self, case: Case) -> Job:
        # What is compared after one step needs no more of its own.
        steps = 1 if case.leg == "float32" else STEPS
        if (case.single, steps) not in self._jobs:
            self._jobs[case.single, steps] = self.pool.submit(1, train_reference, case.single, steps)
        return self._jobs[case.single, steps]

    def _start(self, case: Case) -> Job:
        if case not in self._jobs:
            if case.leg == "float64":
                arguments: tuple[Any, ...] = (case.run, STEPS, None, ("slots",))
            elif case.leg == "float32":
                arguments = (case.run, 1, None, ("gradients", "slots"))
            else:
                arguments = (case.run, STEPS, self.reference(case).trace, ("slots",))
            self._jobs[case] = self.pool.submit(case.world_size, train, *arguments)
        return self._jobs[case]

    def _history(self, job: Job, run: RunConfig) -> History:
        if job.number not in self._histories:
            self._histories[job.number] = joined(run, job.result())
        return self._histories[job.number]

    def replayed_once(self, case: Case) -> History:
        """One step of a case's layout that reads the reference's slots."""
        trace = self.reference(case).trace
        seen = self.pool.run(case.world_size, train, case.run, 1, trace, ("gradients", "slots"))
        return joined(case.run, seen)


def gradient_deviations(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Norm of the difference of each gradient as a share of the expected gradient's norm.

    The scalar gate's bias is one number, whose gradient is what is left when hundreds of tokens cancel: it is
    measured together with the weight of the same projection.
    """
    assert found.keys() == expected.keys()
    difference: dict[str, float] = {}
    norm: dict[str, float] = {}
    for name, value in expected.items():
        unit = name.replace("scalar_gate.bias", "scalar_gate.weight")
        wide = value.astype(np.float64)
        difference[unit] = math.hypot(difference.get(unit, 0.0), np.linalg.norm(found[name].astype(np.float64) - wide))
        norm[unit] = math.hypot(norm.get(unit, 0.0), np.linalg.norm(wide))
    return {unit: value / max(norm[unit], 1e-300) if value else 0.0 for unit, value in difference.items()}
