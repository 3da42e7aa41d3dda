"""Where optimizers keep their number of updates (mempar.runtime.checkpoint.dense); the rest is the digest law's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mempar.runtime.checkpoint.dense import _name_step_zero, _set_steps


class FusedAdam:
    """Counts as TransformerEngine's: a whole number in each group, none with the parameters."""


def optimizers(kind: str, *, distributed: bool) -> Any:
    inner = FusedAdam() if kind == "fused" else torch.optim.Adam([torch.zeros(2)])
    parallel = SimpleNamespace(distributed_optimizer=distributed)
    return SimpleNamespace(members=[SimpleNamespace(optimizer=inner)], run=SimpleNamespace(parallel=parallel))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_steps_are_written_where_the_optimizer_counts_them(kind: str, distributed: bool, nested: bool) -> None:
    inner: dict[str, Any] = {"state": {0: {"exp_avg": 1.0}}, "param_groups": [{"lr": 1.0}, {"lr": 1.0}]}
    state = {"optimizer": inner} if nested else inner
    owner = optimizers(kind, distributed=distributed)
    _name_step_zero(state, owner)
    assert ("common_step" in inner["state"]) == (kind == "torch")
    _set_steps(state, owner, 7)
    steps = [group.get("step") for group in inner["param_groups"]]
    if kind == "torch" and not distributed:
        assert inner["state"]["common_step"] == 7.0
        assert steps == [None, None]
    else:
        # A float is refused by TransformerEngine's kernel.
        assert steps == [7, 7]
        assert {type(step) for step in steps} == {float if kind == "torch" else int}
