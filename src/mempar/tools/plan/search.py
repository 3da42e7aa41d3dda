"""The layouts that take the shortest steps among those that fit, and why the others do not.

Best first: a bound from below for every layout without its exchange orders them, and the search ends when no bound is
shorter than the slowest plan wanted. Memory is asked of `runtime/estimate`, rules of the run's own configuration and
of `runtime/placement`. Recomputation costs time and saves memory alone, so more of it is tried only where less does
not fit, or barely.
"""

import heapq
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.estimate import Estimate
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.report import estimate_layout
from mempar.runtime.hardware import Hardware
from mempar.runtime.train_config import RECOMPUTE
from mempar.tools.plan.layouts import Grid, Skeleton, grids, laid_out, skeletons
from mempar.tools.plan.step_time import Known, StepTime, step_time

# What an allocator may need beyond tensors, for it hands out blocks and cannot move them; a rule of thumb, the same as
# in the table of an estimate.
SPARE_SHARE = 0.05
# Kinds of bytes that a reason names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that fits.

    Attributes:
        layout: the run, laid out.
        estimate: its memory.
        time: its step.
    """

    layout: Layout
    estimate: Estimate
    time: StepTime

    @property
    def memory_bytes(self) -> int:
        """Most bytes of any rank."""
        return self.estimate.worst.total

    def has_room(self, hardware: Hardware) -> bool:
        """Whether it leaves what an allocator may need."""
        return self.memory_bytes <= (1 - SPARE_SHARE) * hardware.memory_bytes


@dataclass(kw_only=True)
class Rejected:
    """Layouts that were ruled out for the same reason.

    Attributes:
        reason: in words, with the numbers of the one that came nearest to fitting.
        count: how many.
        run: that one.
        num_bytes: what it needs; 0 where memory was not the reason.
    """

    reason: str
    count: int
    run: RunConfig
    num_bytes: int = 0


@dataclass(kw_only=True)
class Found:
    """What a search found.

    Attributes:
        plans: those that fit, fastest first; those that fit barely behind the others.
        rejected: the reasons why others do not, by what stands in the way.
        num_looked: layouts that were looked at.
        num_slower: layouts that were not, or not to the end, because they cannot be faster than the plans.
    """

    plans: list[Plan] = field(default_factory=list)
    rejected: dict[str, Rejected] = field(default_factory=dict)
    num_looked: int = 0
    num_slower: int = 0

    def reject(self, run: RunConfig, key: str, reason: str, num_bytes: int = 0) -> None:
        """Note why a layout was ruled out; of several with the same reason the nearest one stands for all."""
        known = self.rejected.setdefault(key, Rejected(reason=reason, count=0, run=run, num_bytes=num_bytes))
        known.count += 1
        if num_bytes < known.num_bytes:
            known.run, known.reason, known.num_bytes = run, reason, num_bytes


def search(run: RunConfig, num_ranks: int, hardware: Hardware, *, vocab: int, top: int) -> Found:
    """Find the fastest layouts of a run that fit.

    Args:
        run: the run; its layout is not looked at.
        num_ranks: GPUs.
        hardware: what each of them is.
        vocab: tokens of the tokenizer.
        top: how many plans are wanted.
    """
    return _Search(run, num_ranks, hardware, vocab, top).run_all()


def smallest(run: RunConfig, num_ranks: int, hardware: Hardware, *, vocab: int, enough: float = 0.0) -> Estimate | None:
    """The memory of the layout that needs least; None where no layout is allowed.

    Looked at are single samples with everything computed again: no micro-batch or recomputation needs less.

    Args:
        run: the run; its layout is not looked at.
        num_ranks: GPUs.
        hardware: what each of them is.
        vocab: tokens of the tokenizer.
        enough: bytes that are good enough: the first layout that needs no more is taken.
    """
    least: Estimate | None = None
    for skeleton in skeletons(run, num_ranks, hardware):
        if skeleton.micro_batch_size > 1:
            continue
        # Those that cut the tables most first.
        for grid in reversed(grids(run, num_ranks // skeleton.pp)):
            try:
                layout = Layout.of(laid_out(run, skeleton, grid, RECOMPUTE[-1]), num_ranks, vocab)
            except ConfigError:
                continue
            needed = estimate_layout(layout, num_ranks)
            if least is None or needed.worst.total < least.worst.total:
                least = needed
            if least.worst.total <= enough:
                return least
    return least


class _Search:
    def __init__(self, run: RunConfig, num_ranks: int, hardware: Hardware, vocab: int, top: int) -> None:
        self.run, self.num_ranks, self.hardware, self.vocab, self.top = run, num_ranks, hardware, vocab, top
        self.found = Found()
        self.barely: list[Plan] = []
        # Layouts that fit with less recomputation, and those that do so barely.
        self.fitting: set[tuple[Skeleton, Grid]] = set()
        self.tight: set[tuple[Skeleton, Grid]] = set()
        self.queue: list[tuple[float, int, Skeleton, str]] = []
        self.order = itertools.count()

    def run_all(self) -> Found:
        for skeleton in skeletons(self.run, self.num_ranks, self.hardware):
            self._push(skeleton, RECOMPUTE[0])
        while self.queue:
            bound, _, skeleton, recompute = heapq.heappop(self.queue)
            if bound >= self._slowest():
                self.found.num_slower += self._number_of_grids(skeleton)
                self.found.num_slower += sum(self._number_of_grids(each) for _, _, each, _ in self.queue)
                break
            self._expand(skeleton, recompute)
        self.found.plans = sorted(self.found.plans, key=_by_time)
        spare = self.top - len(self.found.plans)
        self.found.plans += sorted(self.barely, key=_by_time)[: max(0, spare)]
        return self.found

    def _push(self, skeleton: Skeleton, recompute: str) -> None:
        """Queue a layout under the least time that it can take with any cut of its tables."""
        try:
            layout = self._layout(skeleton, Grid(), recompute)
        except ConfigError as error:
            self.found.num_looked += 1
            self.found.reject(self.run, _shape(str(error)), str(error))
            return
        bound = step_time(layout, self.hardware, with_tables=False).seconds
        heapq.heappush(self.queue, (bound, next(self.order), skeleton, recompute))

    def _expand(self, skeleton: Skeleton, recompute: str) -> None:
        """Look at all cuts of a layout's tables; where one does not fit, more recomputation is tried later."""
        too_large, known = False, {}
        for grid in self._grids(skeleton):
            if (skeleton, grid) not in self.fitting:
                self.found.num_looked += 1
                too_large |= self._look(skeleton, grid, recompute, known)
        more = RECOMPUTE.index(recompute) + 1
        if too_large and more < len(RECOMPUTE):
            self._push(skeleton, RECOMPUTE[more])

    def _look(self, skeleton: Skeleton, grid: Grid, recompute: str, known: Known) -> bool:
        """Rank one layout; return whether more recomputation is worth a look: it does not fit, or barely."""
        try:
            layout = self._layout(skeleton, grid, recompute)
        except ConfigError as error:
            self.found.reject(self.run, _shape(str(error)), str(error))
            return False
        time = None
        if len(self.found.plans) >= self.top:
            time = step_time(layout, self.hardware, known=known)
            if time.seconds >= self._slowest():
                self.found.num_slower += 1
                return False
        needed = estimate_layout(layout, self.num_ranks)
        total, most = needed.worst.total, self.hardware.memory_bytes
        if total > most:
            self._reject_for_memory(layout.run, needed)
            return True
        plan = Plan(layout=layout, estimate=needed, time=time or step_time(layout, self.hardware, known=known))
        if not plan.has_room(self.hardware):
            # One that fits barely with more recomputation too is only slower.
            if (skeleton, grid) not in self.tight:
                self.tight.add((skeleton, grid))
                self.barely = sorted([*self.barely, plan], key=_by_time)[: self.top]
            return True
        self.fitting.add((skeleton, grid))
        self.found.plans = sorted([*self.found.plans, plan], key=_by_time)[: self.top]
        return False

    def _reject_for_memory(self, run: RunConfig, needed: Estimate) -> None:
        worst = needed.worst
        kinds = sorted(worst.by_kind().items(), key=lambda item: -item[1])[:_NAMED]
        named = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in kinds)
        room = self.hardware.memory_bytes
        # So near that both would read alike.
        over = f", {(worst.total - room) / 2**20:,.0f} MiB too many" if gib(worst.total) == gib(room) else ""
        reason = f"needs {gib(worst.total)} of {gib(room)} GiB{over}: {named}, ..."
        self.found.reject(run, f"memory, most of it {kinds[0][0]}", reason, worst.total)

    def _slowest(self) -> float:
        """What a layout must be faster than to be wanted."""
        plans = self.found.plans
        return plans[-1].time.seconds if len(plans) >= self.top else float("inf")

    def _layout(self, skeleton: Skeleton, grid: Grid, recompute: str) -> Layout:
        return Layout.of(laid_out(self.run, skeleton, grid, recompute), self.num_ranks, self.vocab)

    def _grids(self, skeleton: Skeleton) -> list[Grid]:
        return grids(self.run, self.num_ranks // skeleton.pp)

    def _number_of_grids(self, skeleton: Skeleton) -> int:
        return len(self._grids(skeleton))


def gib(num_bytes: float) -> str:
    """A number of GiB, without the unit."""
    return f"{num_bytes / 2**30:.1f}"


def all_reasons(found: Found) -> Iterator[Rejected]:
    """Reasons, those of most layouts first."""
    yield from sorted(found.rejected.values(), key=lambda each: -each.count)


def _by_time(plan: Plan) -> float:
    return plan.time.seconds


def _shape(message: str) -> str:
    """A message without its numbers: what stands in the way, whatever the sizes."""
    return re.sub(r"\d+", "#", message)
