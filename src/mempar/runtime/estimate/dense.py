"""Bytes of the dense parameters of one rank, of their gradients, and of megatron's optimizer for them.

| train.dtype | weights | gradients | state, plain | state, distributed over d ranks |
| --- | --- | --- | --- | --- |
| bf16 | 2 | 4 | 12: float32 weights and two moments | 12 / d |
| float32 | 4 | 4 | 8: two moments | 8 / d |
| float64 | 8 | 8 | 16: two moments | refused |

Each chunk has one buffer of gradients, and one for experts, whose copies lie on other ranks. Under the distributed
optimizer weights lie in such buffers too; parameters then start on multiples of 64 elements, buckets end on common
multiples of 128 and the number of ranks, and each rank keeps the state of its equal share of every bucket, the gaps
left out (megatron's param_and_grad_buffer.py and distrib_optimizer.py, 0.16.1). A tied embedding on two stages has a
bucket of its own; else a buffer is one bucket, because reductions are not overlapped with the backward pass.

Numbers of steps, one a parameter, are not counted: torch keeps them on the host. A GPU's optimizer is taken to be
fused (TransformerEngine's or apex's): torch's own makes a copy of a moment of all parameters in a step.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.parameters import Parameter, parameters_of

# Elements on which parameters start, and buckets end; see megatron's _ParamAndGradBuffer.
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True, kw_only=True)
class DenseBytes:
    """Bytes on one rank; buffers' gaps are in weights and gradients."""

    weights: int
    gradients: int
    state: int


def dense_bytes(layout: Layout, stage: int, rank: int | None = None) -> DenseBytes:
    """Bytes of a rank of a pipeline stage.

    Args:
        layout: the run.
        stage: the pipeline stage.
        rank: a world rank of it; by default the one that holds most state.
    """
    run, grid = layout.run, layout.grid
    distributed = run.parallel.distributed_optimizer
    # Each element's float32 weights where its own are narrower, and two moments.
    state_bytes = (4 if layout.value_bytes < 4 else 0) + 2 * layout.wide_bytes
    copies = grid.stage_size // grid.tp
    # Context-parallel ranks are copies too: they stand between the tensor-parallel and the data-parallel ones.
    own = None if rank is None else rank % grid.stage_size // grid.tp
    own_experts = None if rank is None else grid.expert_dp_rank(rank)
    held = state = 0
    for parameters in (parameters_of(layout, chunk) for chunk in layout.chunks_of(stage)):
        plain = [each for each in parameters if not each.of_experts]
        experts = [each for each in parameters if each.of_experts]
        for members, num_copies, place in ((plain, copies, own), (experts, copies // grid.ep, own_experts)):
            if not distributed:
                numel = sum(each.numel for each in members)
                held, state = held + numel, state + numel
            else:
                end, shares = _shared_out(tuple((each.numel, each.shared) for each in members), num_copies)
                held += end
                state += (max(shares) if place is None else shares[place]) if shares else 0
    return DenseBytes(
        weights=held * layout.value_bytes,
        gradients=held * layout.wide_bytes,
        state=state * state_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """A stretch `[start, end)` of a buffer that is shared out evenly, and where its parameters lie in it."""

    start: int
    end: int
    spans: list[tuple[int, int]]

    def shares(self, num_ranks: int) -> list[int]:
        """Elements of parameters in each rank's share."""
        share = (self.end - self.start) // num_ranks
        found = [0] * num_ranks
        for first, last in self.spans:
            for rank in range((first - self.start) // share, -(-(last - self.start) // share)):
                low = self.start + rank * share
                found[rank] += min(last, low + share) - max(first, low)
        return found


@lru_cache(maxsize=1024)
def _shared_out(parameters: tuple[tuple[int, bool], ...], num_ranks: int) -> tuple[int, list[int]]:
    """Elements of a buffer, gaps included, and those of parameters in each rank's share; by numel and `shared`.

    Kept, because a planner asks for the same parameters on as many ranks in many layouts.
    """
    buckets = _buckets([Parameter(numel=numel, shared=shared) for numel, shared in parameters], num_ranks)
    shares = [sum(numbers) for numbers in zip(*(each.shares(num_ranks) for each in buckets), strict=True)]
    return (buckets[-1].end if buckets else 0), shares


def _buckets(parameters: list[Parameter], num_ranks: int) -> list[_Bucket]:
    """Where the distributed optimizer's buffer has which parameters: in reverse order, as backward reaches them."""
    divisor = math.lcm(num_ranks, _BUCKET_ALIGNMENT)
    buckets: list[_Bucket] = []
    spans: list[tuple[int, int]] = []

    def close() -> None:
        if spans:
            start = buckets[-1].end if buckets else 0
            buckets.append(_Bucket(start=start, end=_round_up(spans[-1][1], divisor), spans=spans.copy()))
            spans.clear()

    position = 0
    for parameter in reversed(parameters):
        if parameter.shared:
            close()
            position = max(position, buckets[-1].end if buckets else 0)
        start = _round_up(position, _PARAMETER_ALIGNMENT)
        position = start + parameter.numel
        spans.append((start, position))
        if parameter.shared:
            close()
            position = buckets[-1].end
    close()
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
