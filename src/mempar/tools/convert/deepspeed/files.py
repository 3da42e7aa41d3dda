"""The small files of a universal checkpoint, as DeepSpeed's loaders expect them: what is said once, not a tensor.

    latest_universal                                       the name of the folder beside it
    FOLDER/mp_rank_00_model_states.pt                      counters of the run; read at ZeRO stages 1 and 2
    FOLDER/zero_pp_rank_0_mp_rank_00_model_states.pt       the same; read at stage 3
    FOLDER/zero/optimizer_state.pt                         what the optimizer's states have in common
    FOLDER/zero/PARAMETER/step.pt                          updates applied

Rates, betas and decay are not written: DeepSpeed would put those of a group in the place of whatever group stands there
in the run that loads, and a run has its own in its configuration.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch

from mempar.tools.convert.deepspeed.places import ZERO, universal_info

LATEST = "latest_universal"
# DeepSpeed compares it with the version in which its formats changed last.
_DEEPSPEED_VERSION = "0.19.8"
# DeepSpeed leaves groups of parameters unloaded, and says nothing, that have no partner here; a partner may be empty.
_GROUPS = 1024


def folder_of(progress: Mapping[str, Any]) -> str:
    """The folder's name, in DeepSpeed's manner."""
    return f"global_step{progress['step']}_universal"


def step_tensor(progress: Mapping[str, Any]) -> torch.Tensor:
    """Updates applied, as torch's Adam keeps them; DeepSpeed's take it too."""
    return torch.tensor(float(progress["applied_steps"]), dtype=torch.float32)


def small_files(
    parameters: Mapping[str, tuple[int, ...]], progress: Mapping[str, Any], *, has_state: bool
) -> dict[str, bytes]:
    """The content of all small files in the folder, by path.

    Args:
        parameters: shapes by name.
        progress: how far the run was.
        has_state: whether there are moments; weights alone have no step.
    """
    states = _saved(_model_states(parameters, progress))
    step = _saved(step_tensor(progress))
    steps = {f"{ZERO}/{name}/step.pt": step for name in parameters} if has_state else {}
    return {
        "mp_rank_00_model_states.pt": states,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": states,
        f"{ZERO}/optimizer_state.pt": _saved(_optimizer_state(progress)),
        **steps,
    }


def _model_states(parameters: Mapping[str, tuple[int, ...]], progress: Mapping[str, Any]) -> dict[str, Any]:
    step, applied = progress["step"], progress["applied_steps"]
    return {
        # Parameters come from their own folders.
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        # Of DeepSpeed's own schedules, which count the batches done from 0.
        "lr_scheduler": {"last_batch_iteration": step - 1},
        "skipped_steps": step - applied,
        "global_steps": step,
        "global_samples": progress.get("samples", 0),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _DEEPSPEED_VERSION,
        "universal_checkpoint_info": universal_info(parameters),
    }


def _optimizer_state(progress: Mapping[str, Any]) -> dict[str, Any]:
    step = step_tensor(progress)
    return {
        "ds_version": _DEEPSPEED_VERSION,
        "dynamic_loss_scale": False,
        "overflow": False,
        "param_groups": [{} for _ in range(_GROUPS)],
        # Where stage 3 looks for the same.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
