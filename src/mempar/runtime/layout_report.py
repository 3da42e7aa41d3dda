"""layout.json: what every rank holds, so that a layout can be seen and its memory accounted for."""

import json
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers
from mempar.runtime.tables import Table


def write_layout(path: Path, world: World, model: Model, optimizers: Optimizers) -> None:
    """Gather every rank's holdings and write them; every rank must call it."""
    rows: list[Any] = [None] * world.size
    dist.all_gather_object(rows, _holdings(world, model, optimizers))
    if not world.is_main:
        return
    memories = {
        name: {"stages": memory.stages, "shape": [memory.plan.num_slots, memory.plan.value_dim]}
        for name, memory in world.placement.memories.items()
    }
    report = {
        "sizes": world.placement.grid.sizes,
        "memories": memories,
        "reason": world.placement.reason,
        "ranks": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _holdings(world: World, model: Model, optimizers: Optimizers) -> dict[str, Any]:
    grid, rank, state = world.placement.grid, world.rank, mcore.parallel_state
    table_stages = world.placement.table_stages
    groups = {
        "tensor": dist.get_process_group_ranks(state.get_tensor_model_parallel_group()),
        "pipeline": dist.get_process_group_ranks(state.get_pipeline_model_parallel_group()),
        "data": dist.get_process_group_ranks(state.get_data_parallel_group()),
        "expert": dist.get_process_group_ranks(state.get_expert_model_parallel_group()),
        "memory": _group_of(rank, grid.memory_groups(table_stages)),
        "memory_inside": _group_of(rank, grid.inside_groups(table_stages)),
        "memory_across": _group_of(rank, grid.across_groups(table_stages)),
        "copies": {
            name: _group_of(rank, grid.copy_groups(memory.stages)) for name, memory in world.placement.memories.items()
        },
    }
    blocks = [block.layer_number - 1 for chunk in model.chunks for block in chunk.decoder.layers]
    dense_bytes = sum(param.numel() * param.element_size() for chunk in model.chunks for param in chunk.parameters())
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "device": str(world.device),
        "stage": grid.stage_of(rank),
        "blocks": blocks,
        "groups": groups,
        "dense_bytes": dense_bytes,
        "tables": {table.name: _table(table, optimizers) for table in model.tables},
        "history_bytes": {
            memory: history.last_read.numel() * history.last_read.element_size()
            for memory, history in optimizers.histories.items()
        },
    }


def _group_of(rank: int, groups: list[list[int]]) -> list[int]:
    return next((ranks for ranks in groups if rank in ranks), [])


def _table(table: Table, optimizers: Optimizers) -> dict[str, Any]:
    part, values = table.shard.part, table.shard.values
    state = optimizers.tables[table.name].state
    return {
        "rows": [part.row_start, part.row_end],
        "columns": [part.column_start, part.column_end],
        "shape": [part.num_slots, part.value_dim],
        "bytes": values.numel() * values.element_size(),
        "state_bytes": {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()},
    }
