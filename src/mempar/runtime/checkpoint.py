"""Saving and loading through megatron's distributed checkpoint, into any parallel layout.

Dense parameters and their optimizer state are megatron's own sharded tensors; tables and their
moments are blocks of logical tensors `[S, D]` placed by their row and column, so that any cut of a
table reads what it needs. A checkpoint is written beside its final name and renamed when whole.
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
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers
from mempar.runtime.run_dir import describe_checkpoint
from mempar.runtime.tables import Table


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
    _make_moments(optimizers)
    with _quiet():
        state = _sharded_state(model, optimizers, loading=False)
        _name_step_zero(state["optimizer"])
        mcore.dist_checkpointing.save(
            state,
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
        state: Any = mcore.dist_checkpointing.load(_sharded_state(model, optimizers, loading=True), str(path))
        for place, chunk in enumerate(model.chunks):
            chunk.load_state_dict(state[_chunk_name(model, place)], strict=False)
        optimizers.dense.load_state_dict(state["optimizer"])
    for table in model.tables:
        for key, tensor in _table_tensors(table, optimizers).items():
            tensor.copy_(state["tables"][key])
        optimizers.tables[table.name].step = meta["applied_steps"]


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    whole = sorted(path for path in checkpoints.glob("step_????????") if (path / "meta.json").is_file())
    for path in whole[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _make_moments(optimizers: Optimizers) -> None:
    """Give parameters that were never stepped the state of step 0, which torch's Adam makes in its first step.

    Without it a checkpoint written before any step was applied would lack tensors that loading asks for.
    """
    for member in optimizers.members:
        if not isinstance(member.optimizer, torch.optim.Adam):
            continue
        for param in (param for group in member.optimizer.param_groups for param in group["params"]):
            if not member.optimizer.state[param]:
                member.optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _name_step_zero(state: Any) -> None:
    """Note the step that megatron leaves out of its optimizers' state while it is 0, and misses when it loads."""
    if isinstance(state, dict):
        if "param_groups" in state and state.get("state"):
            state["state"].setdefault("common_step", torch.tensor(0.0))
        for part in state.values():
            _name_step_zero(part)


def _chunk_name(model: Model, place: int) -> str:
    return "model" if len(model.chunks) == 1 else f"model{place}"


def _sharded_state(model: Model, optimizers: Optimizers, *, loading: bool) -> dict[str, Any]:
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
    state["tables"] = {
        key: _table_block(key, tensor, table)
        for table in model.tables
        for key, tensor in _table_tensors(table, optimizers).items()
    }
    return state


def _table_tensors(table: Table, optimizers: Optimizers) -> dict[str, Tensor]:
    """The table's values under its name, its optimizer's state under names that start with it."""
    state = {f"{table.name}.{name}": tensor for name, tensor in optimizers.tables[table.name].state.items()}
    return {table.name: table.shard.values, **state}


def _table_block(key: str, tensor: Tensor, table: Table) -> Any:
    part = table.shard.part
    return mcore.ShardedTensor(
        key=key,
        data=tensor,
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=(part.num_slots, part.value_dim),
        global_offset=(part.row_start, part.column_start),
        # Shards need not be equal, so a table has no regular grid of fragments.
        axis_fragmentations=None,
        replica_id=table.copies.rank,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's checkpointing warns about its own and torch's deprecations on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
