"""Dense parameters and their optimizers' state as parts of logical tensors, from megatron's sharded state dicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mempar.runtime import mcore
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.shard_file import dtype_name
from mempar.runtime.checkpoint.torch_dist import saved
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers


def dense_parts(model: Model, optimizers: Optimizers) -> tuple[list[tuple[Box, Tensor]], dict[str, bytes], Any]:
    """What this rank has to save; every rank must call it.

    Returns:
        Parts of tensors, none that another rank saves; other things, serialised, by megatron's keys; and what all
        ranks have in common, megatron's state dict without what is sharded.
    """
    for member in optimizers.members:
        mcore.make_moments(member.optimizer)
    state = _sharded_state(model, optimizers, loading=False)
    _name_step_zero(state["optimizer"], optimizers)
    # Coverage is checked by us, for the tables as well (see boxes.py).
    sharded, common = mcore.save_preprocess(state, validate_access_integrity=False)
    parts, objects = [], {}
    item: Any
    for item in mcore.nested_values(sharded):
        if not mcore.is_main_replica(item.replica_id):
            continue
        if isinstance(item, mcore.ShardedTensor):
            box, data = _box_of(item), item.data
            assert data is not None
            parts.append((box, data.detach().contiguous().view(box.sizes)))
        else:
            objects[item.unique_key] = bytes(saved([item.data]))
    return parts, objects, common


def weight_parts(model: Model) -> list[tuple[Box, Tensor]]:
    """This rank's parameters as parts of logical tensors: views, so that filling them fills the model.

    Every rank must call it. There need be no optimizer: what a checkpoint holds of one is not asked for.
    """
    sharded, _ = mcore.save_preprocess(_sharded_weights(model, _metadata()), validate_access_integrity=False)
    parts: list[tuple[Box, Tensor]] = []
    item: Any
    for item in mcore.nested_values(sharded):
        if isinstance(item, mcore.ShardedTensor):
            box, data = _box_of(item), item.data
            assert data is not None
            # A copy would be filled in vain: `view` refuses what is not contiguous.
            parts.append((box, data.detach().view(box.sizes)))
    wanted = sum(param.numel() for chunk in model.chunks for param in chunk.parameters())
    assert sum(box.num_elements for box, _ in parts) == wanted, "megatron describes other parameters than there are"
    return parts


class DenseTarget:
    """This rank's parameters and their optimizers' state, to be filled from a checkpoint.

    What ranks have in common (learning rates, betas) is the run's own, not the checkpoint's; of megatron's other
    objects (`_extra_state`, which would be unpickled) none is needed.
    """

    def __init__(self, model: Model, optimizers: Optimizers) -> None:
        """Lay out what is wanted; every rank must call it."""
        self.model, self.optimizers = model, optimizers
        sharded, own, self._factories = mcore.load_preprocess(_sharded_state(model, optimizers, loading=True))
        self._sharded, state = mcore.extract_sharded_base(sharded)
        self._state: Any = state
        mcore.merge(self._state, own)

    @property
    def names(self) -> set[str]:
        """The tensors that `read` asks for."""
        return {item.key for item in mcore.nested_values(self._sharded) if isinstance(item, mcore.ShardedTensor)}

    def read(self, read: Callable[[Box, Tensor], None]) -> None:
        """Read all tensors; `read` fills one with a part of a logical tensor."""

        def fill(item: Any) -> Any:
            if isinstance(item, mcore.ShardedTensor):
                item.init_data("cpu")
                box, data = _box_of(item), item.data
                assert data is not None
                read(box, data.detach().view(box.sizes))
            return item.data

        self._sharded: Any = mcore.dict_list_map_inplace(fill, self._sharded)

    def apply(self, applied_steps: int) -> None:
        """Take over what was read; every rank must call it.

        Args:
            applied_steps: updates that the state has seen.
        """
        mcore.merge(self._state, self._sharded)
        factories: Any = self._factories
        state = mcore.apply_factory_merges(self._state, factories)
        for place, chunk in enumerate(self.model.chunks):
            found = chunk.load_state_dict(state[_chunk_name(self.model, place)], strict=False)
            missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
            assert not missing, missing
        _set_steps(state["optimizer"], self.optimizers, applied_steps)
        self.optimizers.dense.load_state_dict(state["optimizer"])


def _box_of(item: Any) -> Box:
    return Box(
        name=item.key,
        dtype=dtype_name(item.dtype),
        shape=tuple(item.global_shape),
        offset=tuple(item.global_offset),
        # Experts lie along a dimension that a rank's tensor lacks.
        sizes=(1,) * item.prepend_axis_num + tuple(item.local_shape),
    )


def _sharded_state(model: Model, optimizers: Optimizers, *, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state = _sharded_weights(model, metadata)
    state["optimizer"] = optimizers.dense.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    for member in _member_states(state["optimizer"], optimizers):
        if "fp32_from_fp16_params" in member:
            # Rank 0's empty list would be saved as what all ranks have in common, and fit no other rank's.
            member["fp32_from_fp16_params"] = [
                group or mcore.LocalNonpersistentObject([]) for group in member["fp32_from_fp16_params"]
            ]
    return state


def _sharded_weights(model: Model, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        _chunk_name(model, place): chunk.sharded_state_dict(metadata=metadata)
        for place, chunk in enumerate(model.chunks)
    }


def _metadata() -> dict[str, Any]:
    """What megatron wants to be told when it describes a model."""
    return {
        "dp_cp_group": mcore.parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "chained_optim_avoid_prefix": True,
    }


def _chunk_name(model: Model, place: int) -> str:
    return "model" if len(model.chunks) == 1 else f"model{place}"


def _member_states(state: dict[Any, Any], optimizers: Optimizers) -> list[dict[str, Any]]:
    """The states of megatron's optimizers (the experts have one of their own), one by one."""
    count = len(optimizers.members)
    return [state] if count == 1 else [state[place] for place in range(count)]


def _name_step_zero(state: dict[Any, Any], optimizers: Optimizers) -> None:
    """Note the step that megatron leaves out of torch's Adam's state while it is 0, and misses when it loads."""
    for member, owner in zip(_member_states(state, optimizers), optimizers.members, strict=True):
        inner = member.get("optimizer", member)
        if isinstance(owner.optimizer, torch.optim.Adam) and inner.get("state"):
            inner["state"].setdefault("common_step", torch.tensor(0.0))


def _set_steps(state: dict[Any, Any], optimizers: Optimizers, steps: int) -> None:
    """Write the number of updates into each optimizer's state, which megatron keeps with what ranks have in common.

    TransformerEngine's Adam counts in its groups, in whole numbers; torch's in a tensor a parameter, for which
    the distributed optimizer has a number in its groups.
    """
    for member, owner in zip(_member_states(state, optimizers), optimizers.members, strict=True):
        inner, of_torch = member.get("optimizer", member), isinstance(owner.optimizer, torch.optim.Adam)
        if of_torch and not optimizers.run.parallel.distributed_optimizer:
            # Where there are no parameters (the experts' on a stage without experts) there is no state either.
            inner.setdefault("state", {})["common_step"] = torch.tensor(float(steps))
            continue
        for group in inner["param_groups"]:
            group["step"] = float(steps) if of_torch else steps
