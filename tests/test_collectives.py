"""What carries memory parallelism, and what counts it."""

import torch
import torch.distributed as dist

from mempar.parallel.ledger import ByteLedger
from thread_groups import GLOO_DTYPES, sent


def test_gloo_carries_what_threads_carry() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype in GLOO_DTYPES:
            received = torch.zeros(3, dtype=dtype)
            dist.all_to_all_single(received, torch.arange(3).to(dtype), [3], [3])
            assert received.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()


def test_ledger_counts_bytes_and_calls_until_cleared() -> None:
    ledger = ByteLedger()
    for phase, num_bytes in (("values", 3), ("entries", 0), ("values", 4)):
        ledger.add(phase, num_bytes)
    assert (sent(ledger), dict(ledger.calls)) == ({"values": 7, "entries": 0}, {"values": 2, "entries": 1})
    ledger.clear()
    assert sum(ledger.sent_bytes.values()) == ledger.calls.total() == 0
