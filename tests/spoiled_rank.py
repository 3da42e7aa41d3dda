"""A real rank whose copy of a table goes astray in step 2, on rank 1: `launch_local(..., worker="spoiled_rank")`."""

import sys
from typing import Any

import torch.distributed as dist

from mempar.runtime import train
from mempar.runtime.config import RunConfig
from mempar.runtime.launch import worker
from mempar.runtime.model import Model

check_copies = train.check_copies


def spoil_and_check(run: RunConfig, model: Model, optimizers: Any, step: int, *, saving: bool = False) -> None:
    if step == 2 and dist.get_rank() == 1:
        model.tables[0].shard.values[7, 3] += 1.0
    check_copies(run, model, optimizers, step, saving=saving)


if __name__ == "__main__":
    train.check_copies = spoil_and_check
    sys.path.pop(0)
    worker.leave(worker.main())
