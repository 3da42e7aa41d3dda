"""Saving and loading through megatron's distributed checkpoint, into any parallel layout.

Dense parameters and their optimizer state are megatron's own sharded tensors; tables and their
optimizers' state are blocks of logical tensors (`[S, D]`, or `[S, tiles of D]` for statistics of tiles),
placed by their row and column, so that any cut of a table reads what it needs. A checkpoint is written
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
from mempar.runtime.tables import Table

# In a checkpoint's description: for each memory with a history of its rows the step after which it begins.
HISTORY_SINCE = "history_since"


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
        state = _sharded_state(model, optimizers, list(optimizers.histories), loading=False)
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
        discard(path)
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
    with_history = [memory for memory in optimizers.histories if memory in meta.get(HISTORY_SINCE, {})]
    with _quiet():
        wanted = _sharded_state(model, optimizers, with_history, loading=True)
        state: Any = mcore.dist_checkpointing.load(wanted, str(path))
        for place, chunk in enumerate(model.chunks):
            chunk.load_state_dict(state[_chunk_name(model, place)], strict=False)
        _set_steps(state["optimizer"], optimizers, meta["applied_steps"])
        optimizers.dense.load_state_dict(state["optimizer"])
    for table in model.tables:
        for key, tensor in _table_tensors(table, optimizers).items():
            tensor.copy_(state["tables"][key])
        optimizers.tables[table.name].step = meta["applied_steps"]
    for memory, history in optimizers.histories.items():
        history.step = meta["step"]
        if memory in with_history:
            history.last_read.copy_(state["histories"][memory])
        else:
            history.last_read.zero_()


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    whole = sorted(path for path in checkpoints.glob("step_????????") if (path / "meta.json").is_file())
    for path in whole[:-keep]:
        discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint, if it is there: it has lost its name before it loses its first file."""
    gone = path.with_name(path.name + ".discarded")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


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


def _sharded_state(model: Model, optimizers: Optimizers, with_history: list[str], *, loading: bool) -> dict[str, Any]:
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
    for member in _member_states(state["optimizer"], optimizers):
        if "fp32_from_fp16_params" in member:
            # Rank 0's empty list would be saved as what all ranks have in common, and fit no other rank's.
            member["fp32_from_fp16_params"] = [
                group or mcore.LocalNonpersistentObject([]) for group in member["fp32_from_fp16_params"]
            ]
    state["tables"] = {
        key: _table_block(key, tensor, optimizers.place_of(table, key), table)
        for table in model.tables
        for key, tensor in _table_tensors(table, optimizers).items()
    }
    state["histories"] = {
        table.memory: _history_block(optimizers.histories[table.memory].last_read, table)
        for table in model.tables
        if table.memory in with_history
    }
    return state


def _member_states(state: dict[Any, Any], optimizers: Optimizers) -> list[dict[str, Any]]:
    """The states of megatron's optimizers (the experts have one of their own), one by one."""
    count = len(optimizers.members)
    return [state] if count == 1 else [state[place] for place in range(count)]


def _set_steps(state: dict[Any, Any], optimizers: Optimizers, steps: int) -> None:
    """Write the number of updates into each optimizer's state.

    Megatron saves what all ranks have in common as rank 0 has it, and the experts' optimizer of a rank
    without experts has taken no step: Adam would forget its count on all others.
    """
    for member in _member_states(state, optimizers):
        if "param_state" in member:
            for group in member["optimizer"]["param_groups"]:
                group["step"] = float(steps)
        else:
            member.get("optimizer", member)["state"]["common_step"] = torch.tensor(float(steps))


def _table_tensors(table: Table, optimizers: Optimizers) -> dict[str, Tensor]:
    """The table's values under its name, its optimizer's state under names that start with it."""
    state = {f"{table.name}.{name}": tensor for name, tensor in optimizers.tables[table.name].state.items()}
    return {table.name: table.shard.values, **state}


def _table_block(key: str, tensor: Tensor, part: TableSlice, table: Table) -> Any:
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


def _history_block(last_read: Tensor, table: Table) -> Any:
    part = table.shard.part
    return mcore.ShardedTensor(
        key=f"{table.memory}.last_read",
        data=last_read,
        dtype=last_read.dtype,
        local_shape=(part.num_rows,),
        global_shape=(part.num_slots,),
        global_offset=(part.row_start,),
        axis_fragmentations=None,
        # Column shards hold the same rows, as copies do.
        replica_id=table.copies.rank + table.copies.size * part.column_start,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's checkpointing warns about its own and torch's deprecations on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
