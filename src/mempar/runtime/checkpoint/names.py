"""Names of tensors in checkpoints that mean the same: megatron's two kinds of optimizers spell one of them apart.

Moments are `optimizer.state.exp_avg.PARAMETER` in both. The float32 copy of a parameter that is stepped is
`fp32_param` in the plain optimizer, where there is one only for bf16 parameters, and `param` in the
distributed one, where there is one always. Nothing here imports torch.
"""

from collections.abc import Container

_STATE = "optimizer.state."
_MASTERS = (f"{_STATE}param.", f"{_STATE}fp32_param.")


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


def stored_name(wanted: str, stored: Container[str]) -> str:
    """Under which name a checkpoint holds what a run wants; the wanted one when it holds it under none.

    A copy that is stepped is equal to the parameter where no other copy was kept.
    """
    parameter = parameter_of_master(wanted)
    if wanted in stored or parameter is None:
        return wanted
    others = (*(prefix + parameter for prefix in _MASTERS), parameter)
    return next((name for name in others if name in stored), wanted)
