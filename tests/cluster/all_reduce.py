"""A rank of plain torch: one all_reduce over gloo; each rank leaves what it saw in the directory that is given."""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
total = torch.tensor([10.0**rank])
dist.all_reduce(total)
seen = {"host": socket.gethostname(), "world_size": dist.get_world_size(), "total": total.item(), "pid": os.getpid()}
(Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(seen))
dist.destroy_process_group()
