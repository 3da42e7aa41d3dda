"""A rank of the tests of exchange times: measures the links, and exchanges, when it is asked to.

    python exchange_rank.py DIRECTORY PARENT    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are those of torch

Asked by `ask-N.json` in the directory, it answers with `answer-N-RANK.json`, for N = 0, 1, ... until it is asked for
nothing, the process that started it (PARENT) dies, or nothing comes of a question for some minutes: it runs before
whatever else the machine does. Moments are of the clock that all processes of a machine share.
"""

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mempar.kernels.dispatch import TORCH
from mempar.memory.values import ValueShard
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.link_probe import measure_topology
from mempar.parallel.one_hop import OneHop
from mempar.parallel.ranks import RankGrid
from mempar.parallel.shard_plan import ShardPlan
from mempar.parallel.two_hops import TwoHops
from mempar.runtime.launch.parent import die_with

CPU = torch.device("cpu")
# From one question to the next, at the most; linked_ranks.py waits less long for an answer.
DEADLINE_SECONDS = 300
# What a message across and waking up may take.
AHEAD_SECONDS = 0.02


def meet() -> float:
    """Let all ranks of the world return at one moment: after a barrier they are a message's way apart."""
    dist.barrier()
    moment = torch.tensor([time.monotonic() + AHEAD_SECONDS], dtype=torch.float64)
    dist.broadcast(moment, 0)
    time.sleep(max(0.0, moment.item() - time.monotonic()))
    return time.monotonic()


class TimedGroup(MemberGroup):
    """Notes when each all-to-all was called, by all ranks of the world at once, and when it ended."""

    def __init__(self, process_group: Any, ledger: ByteLedger, calls: list[tuple[str, float, float]]) -> None:
        super().__init__(process_group, ledger)
        self.calls = calls

    def all_to_all(self, send: Any, send_sizes: Any, receive_sizes: Any, phase: str) -> Any:
        start = meet()
        received = super().all_to_all(send, send_sizes, receive_sizes, phase)
        self.calls.append((phase, start, time.monotonic()))
        return received


def interface_bytes() -> int:
    """What this host has sent to others."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    raise AssertionError("no eth0")


class Groups:
    """Groups of the world for one grid; torch's are made once."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def join(self, rank_lists: list[list[int]]) -> Any:
        """The group of this rank; all must call it."""
        for ranks in rank_lists:
            if tuple(ranks) not in self.made:
                self.made[tuple(ranks)] = dist.new_group(ranks)
        return next(self.made[tuple(ranks)] for ranks in rank_lists if dist.get_rank() in ranks)


def exchange(asked: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """One lookup forward and backward, some times over."""
    rank, size, hops = dist.get_rank(), dist.get_world_size(), asked["hops"]
    plan = ShardPlan(**asked["plan"])
    grid = RankGrid(world=size, mp=size, mp_rows=plan.num_row_shards, mp_hops=hops)
    ledger, calls = ByteLedger(), []
    world = TimedGroup(groups.join(grid.memory_groups((0,))), ledger, calls)
    route = OneHop(plan, world)
    if hops == 2:
        inside, across = (groups.join(lists) for lists in (grid.inside_groups((0,)), grid.across_groups((0,))))
        route = TwoHops(plan, TimedGroup(inside, ledger, calls), TimedGroup(across, ledger, calls))
    shard = ValueShard(plan.part_of(rank), seed=5, dtype=torch.float32, device=CPU, backend=TORCH)
    reader = ShardedReader(shard, plan, world, value_route=route)
    counts = asked["token_counts"]
    draw = torch.Generator().manual_seed(asked["seed"])
    slots = [torch.randint(plan.num_slots, (count, asked["reads"]), generator=draw) for count in counts]
    weight = torch.ones(slots[rank].shape, requires_grad=True)
    sent = []
    for _ in range(asked["repeats"]):
        ledger.clear()
        dist.barrier()
        before = interface_bytes()
        out = reader.read(reader.find(slots[rank], counts), weight)
        out.sum().backward()
        dist.barrier()
        sent.append(interface_bytes() - before)
        shard.take_gradient()
    cuts = torch.tensor(plan.row_cuts)
    owned = [torch.histogram(slot.double().view(-1), cuts.double()).hist.int().tolist() for slot in slots]
    return {"calls": calls, "owned": owned, "ledger": dict(ledger.sent_bytes), "interface_bytes": sent}


def main(directory: Path) -> None:
    """Answer until there is nothing to be asked."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups, number = Groups(), 0
    while True:
        # Its signal ends the process, whatever it waits for.
        signal.alarm(DEADLINE_SECONDS)
        question = directory / f"ask-{number}.json"
        while not question.exists():
            time.sleep(0.01)
        asked = json.loads(question.read_text())
        if asked["what"] == "end":
            break
        answer = dataclasses.asdict(measure_topology(CPU)) if asked["what"] == "probe" else exchange(asked, groups)
        path = directory / f"answer-{number}-{dist.get_rank()}.json"
        path.with_suffix(".part").write_text(json.dumps(answer))
        path.with_suffix(".part").rename(path)
        number += 1
    dist.destroy_process_group()


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    signal.alarm(DEADLINE_SECONDS)
    main(Path(sys.argv[1]))
