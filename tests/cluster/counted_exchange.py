"""Ranks that exchange in several layouts, and read what their host's interface sent meanwhile.

Two ranks a host: 0 and 1 on the first, 2 and 3 on the second. For every layout each leaves in the directory that is
given what its ledger counted, how much of that went to the other host, and the interface's own counter.

    RANK=0 ... counted_exchange.py DIRECTORY INTERFACE       this rank and the next one
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.kernels.dispatch import TORCH
from mempar.memory.values import ValueShard
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.exchange import ShardedReader
from mempar.parallel.ledger import ByteLedger
from mempar.parallel.shard_plan import ShardPlan
from mempar.parallel.two_hops import TwoHops

# (members, row shards, hops): one rank a host, where all that is sent leaves it, and both.
LAYOUTS = {
    "rows": ([0, 2], 2, 1),
    "columns": ([0, 2], 1, 1),
    "rows of four": ([0, 1, 2, 3], 4, 1),
    "columns of four": ([0, 1, 2, 3], 1, 1),
    "grid": ([0, 1, 2, 3], 2, 1),
    "grid in two hops": ([0, 1, 2, 3], 2, 2),
}
TOKENS, READS, SLOTS, WIDTH = 512, 32, 4096, 256
LOOKUPS = 3
RANKS_PER_HOST = 2


class HostGroup(MemberGroup):
    """Counts beside what it sends how much of it goes to another host."""

    def __init__(self, members: list[int], ledger: ByteLedger) -> None:
        # All ranks make a group, members or not.
        super().__init__(dist.new_group(members), ledger)
        here = dist.get_rank() // RANKS_PER_HOST
        self.elsewhere = [place for place, member in enumerate(members) if member // RANKS_PER_HOST != here]
        self.left_bytes = 0

    def all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int], phase: str) -> Tensor:
        row_bytes = send.element_size() * send[:1].numel()
        self.left_bytes += row_bytes * sum(send_sizes[place] for place in self.elsewhere)
        return super().all_to_all(send, send_sizes, receive_sizes, phase)


def sent_by(interface: str) -> int:
    """Bytes that an interface has sent when all ranks have come this far, and none further."""
    dist.barrier()
    counter = int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    dist.barrier()
    return counter


def look_up(reader: ShardedReader, tokens: list[int]) -> None:
    """Forward and backward."""
    mine = tokens[reader.group.rank]
    weight = torch.rand(mine, READS, requires_grad=True)
    found = reader.find(torch.randint(SLOTS, (mine, READS)), tokens)
    reader.read(found, weight).sum().backward()


def exchange(members: list[int], rows: int, hops: int, interface: str) -> dict[str, int]:
    """Look up several times in one layout."""
    plan = ShardPlan(
        num_slots=SLOTS,
        value_dim=WIDTH,
        column_tile=16,
        num_row_shards=rows,
        num_column_shards=len(members) // rows,
    )
    ledger = ByteLedger()
    places = range(0, len(members), rows)
    insides = [HostGroup(members[start : start + rows], ledger) for start in places] if hops == 2 else []
    acrosses = [HostGroup(members[start::rows], ledger) for start in range(rows)] if hops == 2 else []
    group = HostGroup(members, ledger)
    groups = [one for one in (group, *insides, *acrosses) if one.rank >= 0]
    reader = None
    if group.rank >= 0:
        part = plan.part_of(group.rank)
        shard = ValueShard(part, seed=1, dtype=torch.float32, device=torch.device("cpu"), backend=TORCH)
        route = TwoHops(plan, groups[1], groups[2], backend=TORCH) if hops == 2 else None
        reader = ShardedReader(shard, plan, group, value_route=route)
        # Connections are made when they are first used.
        look_up(reader, [1] * len(members))
    ledger.clear()
    for one in groups:
        one.left_bytes = 0
    before = sent_by(interface)
    for _ in range(LOOKUPS if reader else 0):
        # Unequal numbers of tokens, which all know.
        look_up(reader, [TOKENS - 40 * place for place in range(len(members))])
    counter = sent_by(interface) - before
    return {
        "measured": sum(ledger.sent_bytes.values()),
        "left": sum(one.left_bytes for one in groups),
        "counter": counter,
    }


def exchange_all(rank: int, directory: str, interface: str) -> None:
    """Exchange in every layout, as one rank."""
    dist.init_process_group("gloo", rank=rank)
    torch.manual_seed(rank)
    found = {name: exchange(*layout, interface) for name, layout in LAYOUTS.items()}
    (Path(directory) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Be two ranks: torch is imported once."""
    first = int(os.environ.pop("RANK"))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=exchange_all, args=(first + place, *sys.argv[1:])) for place in range(RANKS_PER_HOST)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


if __name__ == "__main__":
    main()
