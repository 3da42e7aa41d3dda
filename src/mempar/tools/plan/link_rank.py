"""A rank of those that measure this machine's links: `python -m mempar.tools.plan.link_rank RANK WORLD DIRECTORY`."""

import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path

# What ranks wait for each other; if nobody is left to wait for, they end by themselves.
_PATIENCE = datetime.timedelta(seconds=60)
# Where ranks meet, and where the first leaves what all of them found.
_MEETING, FOUND = "meeting", "link.json"


def main(rank: int, world: int, directory: Path) -> None:
    """Measure with the other ranks; the first writes what all know then."""
    import torch
    import torch.distributed as dist

    from mempar.parallel.link_probe import measure_topology

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = dist.FileStore(str(directory / _MEETING), world)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    inside = measure_topology(device).inside
    if rank == 0:
        (directory / FOUND).write_text(json.dumps(asdict(inside)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
