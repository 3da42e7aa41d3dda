"""Saving and loading through megatron's distributed checkpoint, into any parallel layout.

Dense parameters and their optimizer state are megatron's own sharded tensors; the table and its
optimizer's state are blocks of logical tensors (`[S, D]`, or `[S, tiles of D]` for statistics of tiles),
placed by their row and column, so that any cut of the table reads what it needs. A checkpoint is written
beside its final name and renamed when whole.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mempar
from mempar.dims import TableSlice
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers
from mempar.runtime.run_dir import describe_checkpoint


def save(path: Path, run: RunConfig, world: World, model: Model, optimizers: Optimizers, meta: dict) -> None:
    """Write a checkpoint; every rank must call it.

    Args:
        path: final directory; replaced if it exists.
        run: written into the checkpoint.
        world: the ranks.
        model: parameters and table.
        optimizers: moments and step counts.
        meta: what else is needed to continue (`step`, ...), plain JSON.
    """
    partial = path.with_name(path.name + ".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        mcore.dist_checkpointing.save(
            _sharded_state(world, model, optimizers, loading=False),
            str(partial),
            # One file a rank.
            sharded_strategy=mcore.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        )
    if world.is_main:
        versions = {"mempar": mempar.__version__, "torch": torch.__version__}
        describe_checkpoint(run, partial, {**meta, "world": world.size, "versions": versions})
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    dist.barrier()


def load(path: Path, world: World, model: Model, optimizers: Optimizers, meta: dict) -> None:
    """Read a checkpoint into this layout; every rank must call it.

    Args:
        path: a directory written by `save`, in any layout.
        world: the ranks.
        model: parameters and table, overwritten.
        optimizers: moments and step counts, overwritten.
        meta: the checkpoint's description, as read by `run_dir.read_meta`.
    """
    with _quiet():
        state: Any = mcore.dist_checkpointing.load(_sharded_state(world, model, optimizers, loading=True), str(path))
        for place, chunk in enumerate(model.chunks):
            chunk.load_state_dict(state[_chunk_name(model, place)], strict=False)
        optimizers.dense.load_state_dict(state["optimizer"])
    for name, tensor in _table_tensors(model, optimizers).items():
        tensor.copy_(state["table"][name])
    if optimizers.table is not None:
        optimizers.table.step = meta["applied_steps"]


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    whole = sorted(path for path in checkpoints.glob("step_????????") if (path / "meta.json").is_file())
    for path in whole[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _chunk_name(model: Model, place: int) -> str:
    return "model" if len(model.chunks) == 1 else f"model{place}"


def _sharded_state(world: World, model: Model, optimizers: Optimizers, *, loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": mcore.parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "chained_optim_avoid_prefix": True,
    }
    state: dict[str, Any] = {
        _chunk_name(model, place): chunk.sharded_state_dict(metadata=metadata)
        for place, chunk in enumerate(model.chunks)
    }
    state["optimizer"] = optimizers.dense.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    state["table"] = {
        name: _table_block(name, tensor, _part_of(name, optimizers), world)
        for name, tensor in _table_tensors(model, optimizers).items()
    }
    return state


def _table_tensors(model: Model, optimizers: Optimizers) -> dict[str, Tensor]:
    if model.table is None or optimizers.table is None:
        return {}
    return {"values": model.table.values, **optimizers.table.state}


def _part_of(name: str, optimizers: Optimizers) -> TableSlice:
    assert optimizers.table is not None
    return optimizers.table.place_of(name)


def _table_block(name: str, tensor: Tensor, part: TableSlice, world: World) -> Any:
    assert world.groups is not None
    return mcore.ShardedTensor(
        key=f"memory.{name}",
        data=tensor,
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=(part.num_slots, part.value_dim),
        global_offset=(part.row_start, part.column_start),
        # Shards need not be equal, so the table has no regular grid of fragments.
        axis_fragmentations=None,
        replica_id=world.groups.copies.rank,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's checkpointing warns about its own and torch's deprecations on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
