"""Which micro-batches a stage has in flight: the order of forward and backward passes of megatron's schedules.

Without a pipeline a micro-batch's backward pass follows its forward pass. In 1F1B stage i of p computes p - i - 1
micro-batches ahead, then one forward and one backward in turns. Interleaved over v virtual stages it computes
2 (p - i - 1) + (v - 1) p parts ahead; parts go through the chunks in groups of p micro-batches, backward in the
reverse order of chunks (megatron's schedules.py, get_pp_rank_microbatches and get_schedule_table).
"""

from functools import lru_cache

from mempar.runtime.estimate.layout import Layout


def largest_kept(layout: Layout, stage: int, chunk_bytes: list[int]) -> int:
    """Most bytes that a stage keeps at a time for backward passes.

    Args:
        layout: the run.
        stage: the pipeline stage.
        chunk_bytes: what each of its chunks keeps of a micro-batch.
    """
    pp, vpp = layout.grid.pp, layout.run.parallel.vpp
    # More micro-batches than these repeat what was there before.
    count = min(layout.batch.num_micro_batches, 3 * pp)
    return max(
        sum(number * size for number, size in zip(alive, chunk_bytes, strict=True))
        for alive in _in_flight(pp, vpp, count, stage)
    )


@lru_cache(maxsize=4096)
def _in_flight(pp: int, vpp: int, count: int, stage: int) -> set[tuple[int, ...]]:
    """How many micro-batches of each chunk are in flight after the forward passes of a step."""
    order = [
        (chunk, micro_batch)
        for first in range(0, count, pp)
        for chunk in range(vpp)
        for micro_batch in range(first, min(first + pp, count))
    ]
    ahead = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    ahead = min(ahead, len(order))
    alive = [0] * vpp
    found = set()
    for place, (chunk, _) in enumerate(order):
        alive[chunk] += 1
        found.add(tuple(alive))
        if place >= ahead:
            alive[vpp - 1 - order[place - ahead][0]] -= 1
    return found
