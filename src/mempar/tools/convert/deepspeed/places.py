"""Which file of a universal checkpoint holds which tensor of ours, and what it says about how the tensor is cut.

    zero/PARAMETER/fp32.pt         the float32 copy that is stepped, or the parameter where there is no other
    zero/PARAMETER/exp_avg.pt      moments, in float32
    zero/PARAMETER/exp_avg_sq.pt
    zero/PARAMETER/step.pt         updates applied
    mempar/NAME.pt                 what DeepSpeed has no name for: Adagrad's statistics a tile, histories of rows

Parameters have the names of our checkpoints, tables among them. DeepSpeed loads every file in a parameter's folder as a
state of the parameter's shape: what has another shape must not lie there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mempar.errors import CheckpointError
from mempar.runtime.checkpoint.manifest import OPTIMIZER, WEIGHTS, TensorRecord
from mempar.runtime.checkpoint.names import is_optimizer_state, parameter_of_master

ZERO, OWN = "zero", "mempar"
# The type of all numbers in a parameter's folder.
WIDE = "float32"
FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Types that float32 holds exactly.
_NARROW = ("float32", "bfloat16")
_DENSE_MOMENT = re.compile(rf"optimizer\.state\.({'|'.join(MOMENTS)})\.(.+)")
_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*", re.ASCII)
# Of a parameter that tensor parallelism cuts: the dimension, and in how many matrices that follow one another.
_CUTS = (
    (re.compile(r"embedding\.word_embeddings\.weight|output_layer\.weight"), 0, 1),
    (re.compile(r".*\.self_attention\.linear_qkv\.weight"), 0, 1),
    (re.compile(r".*\.self_attention\.linear_proj\.weight"), 1, 1),
    (re.compile(r".*\.mlp\.linear_fc1\.weight"), 0, 2),
    (re.compile(r".*\.mlp\.linear_fc2\.weight"), 1, 1),
    (re.compile(r".*\.mlp\.experts\.experts\.linear_fc1\.weight"), 1, 2),
    (re.compile(r".*\.mlp\.experts\.experts\.linear_fc2\.weight"), 2, 1),
)
_VOCABULARY, _ROW_PARALLEL, _TWO_HALVES = (_CUTS[0][0],), (_CUTS[2][0], _CUTS[4][0]), (_CUTS[3][0],)
_EXPERTS = re.compile(r".*\.mlp\.experts\.experts\..*")
# Of DeepSpeed 0.19: the names and the meaning of everything here and in files.py.
FORMAT_VERSION = 0.4


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: the file, in the directory of the universal checkpoint.
        dtype: of the numbers in it, as torch spells it.
        parameter: whose state it is; None for what is only ours.
        state: `fp32` or a moment; None for what is only ours.
    """

    path: str
    dtype: str
    parameter: str | None = None
    state: str | None = None


def place_of(name: str, tensors: Mapping[str, TensorRecord]) -> Place:
    """Where a tensor lies.

    Args:
        name: in our checkpoints.
        tensors: all tensors of the checkpoint.

    Raises:
        CheckpointError: when universal checkpoints have no place for it.
    """
    record = tensors[name]
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"a tensor is named {name!r}; names are words joined by dots; the source is damaged.")
    parameter, state = _state_of(name, record, tensors)
    if parameter is None:
        return Place(path=f"{OWN}/{name}.pt", dtype=record.dtype)
    if record.dtype not in _NARROW:
        raise CheckpointError(
            f"{name} is of {record.dtype}; universal checkpoints hold {WIDE}, which would round it; cast the "
            "weights on the way, with --weights-only --dtype float32."
        )
    if tensors[parameter].shape != record.shape:
        raise CheckpointError(
            f"{name} is {list(record.shape)} and {parameter} {list(tensors[parameter].shape)}; a parameter's states "
            "have its shape; the source is damaged."
        )
    return Place(path=f"{ZERO}/{parameter}/{state}.pt", dtype=WIDE, parameter=parameter, state=state)


def _state_of(
    name: str, record: TensorRecord, tensors: Mapping[str, TensorRecord]
) -> tuple[str, str] | tuple[None, None]:
    """The parameter whose state a tensor is, and which one; None twice for what DeepSpeed has no name for."""
    if record.kind == WEIGHTS:
        return name, FP32
    if record.kind != OPTIMIZER:
        return None, None
    moment = _DENSE_MOMENT.fullmatch(name)
    master = parameter_of_master(name)
    owner, _, state = name.rpartition(".")
    if moment is not None:
        parameter, state = moment[2], moment[1]
    elif master is not None:
        parameter, state = master, FP32
    elif is_optimizer_state(name):
        raise CheckpointError(
            f"{name} is a state of an optimizer that universal checkpoints do not know; they hold Adam's; convert "
            "without the optimizer's state, with --weights-only."
        )
    elif state in (*MOMENTS, "master"):
        parameter, state = owner, FP32 if state == "master" else state
    else:
        return None, None
    if parameter not in tensors:
        raise CheckpointError(f"{name} is a state of {parameter}, which is not there; the source is damaged.")
    return parameter, state


def cut_of(parameter: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the files of a parameter's states say about how it is cut; nothing where all ranks hold it whole.

    Args:
        parameter: its name.
        shape: of the whole.
    """
    about: dict[str, Any] = {}
    for pattern, dim, matrices in _CUTS:
        if pattern.fullmatch(parameter):
            about["cat_dim"] = dim
            if matrices > 1:
                about["param_n_sub_params"] = matrices
    if any(pattern.fullmatch(parameter) for pattern in _VOCABULARY):
        about["vocab_tensor"] = True
    if _EXPERTS.fullmatch(parameter):
        about |= {"is_expert_param": True, "ep_num_experts": shape[0]}
    return about


def universal_info(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The same in patterns of names, as DeepSpeed's own converter reads it.

    Args:
        parameters: shapes by name.
    """

    def used(patterns: tuple[re.Pattern[str], ...]) -> list[str]:
        return [
            f"(?:{pattern.pattern})$" for pattern in patterns if any(pattern.fullmatch(name) for name in parameters)
        ]

    whole = [name for name in parameters if "cat_dim" not in cut_of(name, parameters[name])]
    rows = [shape[0] for name, shape in parameters.items() if _VOCABULARY[0].fullmatch(name)]
    # Padding is trained with the rest and is not stripped: its rows count as vocabulary.
    vocabulary = {"original_vocab_size": rows[0], "padded_vocab_size": rows[0]} if rows else {}
    return {
        "universal_checkpoint_version": FORMAT_VERSION,
        **vocabulary,
        "vocabulary_parameter_patterns": used(_VOCABULARY),
        "parameter_with_row_parallelism_patterns": used(_ROW_PARALLEL),
        "parameter_with_2_sub_params_cat_dim_0": used(_TWO_HALVES),
        "tp_replicated_parameter_patterns": [f"{re.escape(name)}$" for name in whole],
    }
