"""Which micro-batches a stage has in flight: the order of forward and backward passes of megatron's schedules.

Without a pipeline a micro-batch's backward pass follows its forward pass. In 1F1B stage i of p computes p - i - 1
micro-batches ahead, then one forward and one backward in turns. Interleaved over v virtual stages it computes
2 (p - i - 1) + (v - 1) p parts ahead; parts go through the chunks in groups of p micro-batches, backward in the
reverse order of chunks (megatron's schedules.py, get_pp_rank_microbatches and get_schedule_table).
"""

from mempar.runtime.estimate.layout import Layout


def largest_kept(layout: Layout, stage: int, chunk_bytes: list[int]) -> int:
    """Most bytes that a stage keeps at a time for backward passes.

    Args:
        layout: the run.
        stage: the pipeline stage.
        chunk_bytes: what each of its chunks keeps of a micro-batch.
    """
    return max(sum(chunk_bytes[chunk] for chunk, _ in alive) for alive in _in_flight(layout, stage))


def _in_flight(layout: Layout, stage: int) -> list[set[tuple[int, int]]]:
    """(chunk, micro-batch) of what is in flight after every forward pass, of a step."""
    pp, vpp, count = layout.grid.pp, layout.run.parallel.vpp, layout.batch.num_micro_batches
    # More than these repeat what was there before.
    count = min(count, 3 * pp)
    order = [
        (chunk, micro_batch)
        for first in range(0, count, pp)
        for chunk in range(vpp)
        for micro_batch in range(first, min(first + pp, count))
    ]
    ahead = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    ahead = min(ahead, len(order))
    alive: set[tuple[int, int]] = set()
    found = []
    for place, part in enumerate(order):
        alive = alive | {part}
        found.append(alive)
        if place >= ahead:
            chunk, micro_batch = order[place - ahead]
            alive = alive - {(vpp - 1 - chunk, micro_batch)}
    return found
