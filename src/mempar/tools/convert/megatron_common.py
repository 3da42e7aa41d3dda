"""What all ranks of megatron have in common in a checkpoint (common.pt), for another kind of dense optimizer.

Learning rates, betas and the number of updates, as megatron's own loader wants them; mempar's takes them from the run.
There are three forms: of plain optimizers of float32 or float64 parameters, of bf16 ones, and of the distributed one.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from mempar.runtime.checkpoint.manifest import TensorRecord
from mempar.runtime.checkpoint.names import is_optimizer_state
from mempar.runtime.config import RunConfig
from mempar.tools.convert.source import MegatronState

_OPTIMIZER = "optimizer"


def common_of(megatron: MegatronState | None, run: RunConfig, tensors: Mapping[str, TensorRecord]) -> dict[Any, Any]:
    """Turn what a source has into what the run's own ranks would save.

    Args:
        megatron: of the source; None where megatron did not make it.
        run: the run, in its layout.
        tensors: what is saved; without the optimizer's state nothing is said of it.
    """
    common = copy.deepcopy(megatron.common) if megatron is not None else {}
    state = common.pop(_OPTIMIZER, None)
    if not isinstance(state, dict) or not any(map(is_optimizer_state, tensors)):
        return common
    # The experts have an optimizer of their own, and then both are numbered.
    members = {key: _member(member, run) for key, member in state.items() if isinstance(key, int)}
    return {**common, _OPTIMIZER: members or _member(state, run)}


def _member(member: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    inner = member.get(_OPTIMIZER, member)
    groups, step = inner.get("param_groups", []), inner.get("state", {}).get("common_step")
    if step is None:
        step = torch.tensor(float(next((group["step"] for group in groups if "step" in group), 0)))
    bare = [{key: value for key, value in group.items() if key != "step"} for group in groups]
    if run.parallel.distributed_optimizer:
        stepped = [{**group, "step": float(step)} for group in bare]
        return {_OPTIMIZER: {"param_groups": stepped}, "param_state_sharding_type": "fully_reshardable"}
    plain = {"param_groups": bare, "state": {"common_step": step}}
    return {_OPTIMIZER: plain} if run.train.dtype == "bf16" else plain
