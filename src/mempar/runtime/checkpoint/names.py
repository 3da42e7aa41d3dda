"""Names of tensors in checkpoints that mean the same: megatron's two kinds of optimizers spell one of them apart.

Moments are `optimizer.state.exp_avg.PARAMETER` in both. The float32 copy of a parameter that is stepped is
`fp32_param` in the plain optimizer, where there is one only for bf16 parameters, and `param` in the
distributed one, where there is one always. Nothing here imports torch.
"""

from collections.abc import Container, Mapping

_STATE = "optimizer.state."
_MASTERS = (f"{_STATE}param.", f"{_STATE}fp32_param.")
_TABLE_MASTER = ".master"


def canonical(name: str) -> str:
    """The name under which a tensor is digested and compared."""
    return _MASTERS[0] + name.removeprefix(_MASTERS[1]) if name.startswith(_MASTERS[1]) else name


def is_optimizer_state(name: str) -> bool:
    """Whether megatron's optimizers own a tensor."""
    return name.startswith(_STATE)


def parameter_of(name: str) -> str:
    """The parameter to which a tensor belongs: itself, or the one whose state it is."""
    return name.removeprefix(_STATE).partition(".")[2] if name.startswith(_STATE) else name


def parameter_of_master(name: str) -> str | None:
    """The parameter of which a tensor is the copy that is stepped; None for other tensors."""
    return next((name.removeprefix(prefix) for prefix in _MASTERS if name.startswith(prefix)), None)


def weights_of_master(name: str) -> str | None:
    """The weights of which a tensor is the copy that is stepped, dense or a table's; None for other tensors."""
    return name.removesuffix(_TABLE_MASTER) if name.endswith(_TABLE_MASTER) else parameter_of_master(name)


def stored_name(wanted: str, stored: Container[str]) -> str:
    """Under which name a checkpoint holds what a run wants; the wanted one when it holds it under none.

    A copy that is stepped is equal to the parameter where no other copy was kept.
    """
    parameter = parameter_of_master(wanted)
    if wanted in stored or parameter is None:
        return wanted
    others = (*(prefix + parameter for prefix in _MASTERS), parameter)
    return next((name for name in others if name in stored), wanted)


def kept_names(dtypes: Mapping[str, str], *, distributed: bool) -> dict[str, str]:
    """The tensors that a run keeps of what another one kept, which had another kind of optimizer or the same.

    Args:
        dtypes: of all tensors that there are, by name.
        distributed: whether the run has megatron's distributed optimizer.

    Returns:
        By the names under which the run keeps them, the names under which they are there.
    """
    kept = {}
    for name in dtypes:
        parameter = parameter_of_master(name)
        if parameter is None:
            kept[name] = name
        elif distributed:
            kept[_MASTERS[0] + parameter] = name
        elif dtypes.get(parameter) != dtypes[name]:
            kept[_MASTERS[1] + parameter] = name
    if distributed:
        # Where no copy was kept, the parameter is the copy.
        stepped = [parameter_of(name) for name in dtypes if is_optimizer_state(name) and parameter_of(name) in dtypes]
        kept = {_MASTERS[0] + parameter: parameter for parameter in stepped} | kept
    return kept
