"""What the links of a run carry at best: collectives of plain bytes over its own groups, timed in the same run.

A profile holds the bandwidth of every exchange against this ceiling. It is taken after the steps, when nothing
computes: calls follow each other without a pause, and all groups of a kind are busy at once, as they are in a step.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Below it bytes hardly count: what is left is the latency of a call.
SMALLEST_BYTES = 4096
# Beyond it bandwidth hardly grows, and a call may be as large as all gradients of a rank: tens of GB, which would be
# allocated once more for each trial.
LARGEST_BYTES = 256 << 20
# From one message size to the next.
_GROWTH = 8
_WARM_UP, _ROUNDS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One collective at one size of message, over all groups of one kind.

    Attributes:
        group: kind of group: mp, tp, pp, dp, ...
        collective: `all_to_all`, `all_reduce` or `send` (every member to the next one).
        ranks: members of a group.
        message_bytes: what a rank hands over, without what it keeps for itself: to all others together
            (all_to_all), to be summed (all_reduce), to the next (send). As `bytes_measured` counts.
        microseconds: of a call: the median of several on a rank, the mean over ranks.
        gb_per_s: bus bandwidth, what leaves a rank by that time: `message_bytes`, of an all_reduce
            `2 (n - 1) / n` times as much on n ranks; 1 GB is 1e9 bytes.
        latency_us: of the smallest message of the same collective and group.
    """

    group: str
    collective: str
    ranks: int
    message_bytes: int
    microseconds: float
    gb_per_s: float
    latency_us: float


def measure_ceiling(
    groups: Mapping[str, dist.ProcessGroup | None],
    largest_bytes: Mapping[str, int],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
) -> list[Ceiling]:
    """Time collectives of several sizes over every kind of group.

    Every rank of the world must call it, with the same kinds in the same order, outside of other collectives. Sends
    `rounds + 2` times each message size up to the largest; the host blocks.

    Args:
        groups: by kind, this rank's group; None where it is alone.
        largest_bytes: by kind, the largest message that this rank handed to a call in a step; the largest of all
            ranks' is the last size, or `LARGEST_BYTES`. None is needed for a kind that sent nothing.
        device: where collectives run.
        rounds: timed calls of every size.

    Returns:
        By kind, collective and size, smallest first; the same on every rank. Kinds of one rank are left out.
    """
    kinds = list(groups)
    largest = torch.tensor([largest_bytes.get(kind, 0) for kind in kinds], dtype=torch.int64, device=device)
    sizes = torch.tensor(
        [1 if group is None else dist.get_world_size(group) for group in groups.values()],
        dtype=torch.int64,
        device=device,
    )
    # Ranks that are alone take part in nothing but the sums over the world.
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    found: list[Ceiling] = []
    for kind, most, ranks in zip(kinds, largest.tolist(), sizes.tolist(), strict=True):
        if ranks == 1:
            continue
        for collective in ("all_to_all", "all_reduce", *(["send"] if kind == "pp" else [])):
            sent_share = 2 * (ranks - 1) / ranks if collective == "all_reduce" else 1.0
            times = [
                (size, _seconds(collective, groups[kind], size, device, rounds)) for size in message_sizes(most, ranks)
            ]
            found += [
                Ceiling(
                    group=kind,
                    collective=collective,
                    ranks=ranks,
                    message_bytes=size,
                    microseconds=seconds * 1e6,
                    gb_per_s=sent_share * size / seconds / 1e9,
                    latency_us=times[0][1] * 1e6,
                )
                for size, seconds in times
            ]
    return found


def message_sizes(largest_bytes: int, ranks: int) -> list[int]:
    """Sizes of messages that are tried: from `SMALLEST_BYTES` in steps of 8 to the largest, which is the last.

    Larger ones than `LARGEST_BYTES` are not tried: its bandwidth stands for theirs.

    Args:
        largest_bytes: that a step sends; may be less than the smallest.
        ranks: members of the group.

    Returns:
        Bytes, ascending; multiples of 4 bytes to every other member.
    """
    largest = min(max(largest_bytes, _GROWTH * SMALLEST_BYTES), LARGEST_BYTES)
    steps = int(math.log(largest / SMALLEST_BYTES, _GROWTH))
    sizes = [SMALLEST_BYTES * _GROWTH**step for step in range(steps + 1)]
    # A last step that is hardly larger than the one before tells nothing new.
    if largest > 2 * sizes[-1]:
        sizes.append(largest)
    else:
        sizes[-1] = largest
    share = 4 * (ranks - 1)
    return [-(-size // share) * share for size in sizes]


def _seconds(
    collective: str, group: dist.ProcessGroup | None, message_bytes: int, device: torch.device, rounds: int
) -> float:
    """Time of a call: each rank's median, the mean of all ranks that have such a group."""
    # Groups begin together, and nobody is still busy with another kind.
    together = torch.zeros(2, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    if group is not None:
        call = _call(collective, group, message_bytes, device)
        for _ in range(_WARM_UP):
            call()
        clock = _cuda_clock if device.type == "cuda" else _cpu_clock
        together = torch.tensor([statistics.median(clock(call, rounds)), 1.0], dtype=torch.float64, device=device)
    dist.all_reduce(together)
    total, ranks = together.tolist()
    return total / ranks


def _call(collective: str, group: dist.ProcessGroup, message_bytes: int, device: torch.device) -> Callable[[], object]:
    """A collective over a group with buffers of its own, made once."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if collective == "all_reduce":
        # Zeros: sums stay small, however often.
        summed = torch.zeros(message_bytes // 4, dtype=torch.float32, device=device)
        return lambda: dist.all_reduce(summed, group=group)
    if collective == "all_to_all":
        sent = torch.zeros(message_bytes // (ranks - 1) * ranks, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        return lambda: dist.all_to_all_single(received, sent, group=group)
    sent = torch.zeros(message_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    following, previous = ((rank + step) % ranks for step in (1, -1))
    return lambda: _send(sent, received, group, following, previous)


def _send(sent: Tensor, received: Tensor, group: dist.ProcessGroup, following: int, previous: int) -> None:
    members = dist.get_process_group_ranks(group)
    operations = [
        dist.P2POp(dist.isend, sent, members[following], group),
        dist.P2POp(dist.irecv, received, members[previous], group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _cpu_clock(call: Callable[[], object], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def _cuda_clock(call: Callable[[], object], rounds: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
