"""Time of merging the reads of a token that chose the same slot, against the work that a merged read saves.

    python benchmarks/merging.py

Both are times a read on one core; their quotient is `MERGE_COLUMNS` of mempar.parallel.cost, the rule of
`memory.merge_duplicates=auto`. The saved work is what an owner does for one entry of a row: its share of
the sum, of the score gradient and of the reduction of row gradients. Least of a number of alternating
runs, because machines are shared.
"""

import time
from collections.abc import Callable

import torch

from mempar.kernels.dispatch import TORCH
from mempar.kernels.reduce_rows import reduce_rows
from mempar.kernels.segment_route import route
from mempar.kernels.weighted_gather import bag_of_entries, gather_scores, weighted_gather

TOKENS, NUM_SLOTS, RUNS = 1024, 256**2, 10
SHAPES = [(128, 256), (128, 512), (128, 1024), (32, 256)]


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(reads: int, width: int) -> tuple[float, float]:
    """Nanoseconds a read of merging, and of an owner's work on an entry."""
    slots = torch.stack([torch.randperm(NUM_SLOTS)[:reads] for _ in range(TOKENS)])
    weight = torch.rand(TOKENS, reads)
    cuts = torch.tensor([0, NUM_SLOTS // 2, NUM_SLOTS])
    table, grad = torch.randn(NUM_SLOTS, width), torch.randn(TOKENS, width)
    rows, flat = slots.view(-1).int(), weight.view(-1)
    offsets = torch.arange(0, len(rows) + 1, reads, dtype=torch.int32)

    def routing(merge: bool) -> None:
        routed = route(slots, cuts, merge=merge, backend=TORCH)
        routed.to_reads(routed.to_entries(weight))

    def owner() -> None:
        weighted_gather(table, rows, flat, offsets, backend=TORCH)
        bags = bag_of_entries(offsets, len(rows))
        gather_scores(table, rows, bags, grad, backend=TORCH)
        reduce_rows(rows, flat, bags, grad, backend=TORCH)

    works = [lambda: routing(False), lambda: routing(True), owner]
    least = [min(times) for times in zip(*([seconds(work) for work in works] for _ in range(RUNS)), strict=True)]
    plain, merged, owned = (time * 1e9 / slots.numel() for time in least)
    return merged - plain, owned


def main() -> None:
    """Measure every shape."""
    torch.set_num_threads(1)
    for reads, width in SHAPES:
        merging, owned = measure(reads, width)
        print(
            f"M={reads} D={width}: merging {merging:.0f} ns a read, an entry's row {owned:.0f} ns "
            f"({owned / width:.2f} ns a column); merging pays from share x D = {merging * width / owned:.0f}"
        )


if __name__ == "__main__":
    main()
