"""Copies that went astray by one element are found and named."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.errors import MemparError
from mempar.runtime import bringup, copies
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import logical_parameters
from rank_pool import RankPool
from toy import Session, toy_run

NORM = "decoder.layers.2.mlp.query.weight"


def first_difference(tensor: Tensor, changed: Tensor) -> int:
    """As of two copies, of which this process plays both."""

    def share(mine: Tensor) -> Tensor:
        theirs = share.other  # type: ignore[attr-defined]
        return torch.stack((mine, theirs(mine)))

    bands_of = copies.digest_bands

    def both(name: str, block: Tensor, *rest: Any) -> Tensor:
        share.other = lambda _: bands_of(name, changed, *rest)  # type: ignore[attr-defined]
        return bands_of(name, block, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "digest_bands", both)
        patch.setattr(copies, "_NUM_BANDS", 4)
        return copies._first_difference("x", tensor, share)


@pytest.mark.parametrize("row", [0, 1, 36, 98, 99])
def test_first_difference_is_found_in_narrowing_bands(row: int) -> None:
    tensor = torch.randn(100, 3)
    changed = tensor.clone()
    changed[row:, 1] += 1.0
    assert first_difference(tensor, changed) == row


def corrupt_and_check(run: RunConfig, where: int, what: str) -> tuple[bool, str]:
    """Whether all copies agree after two steps, and what is said once one element of one of them changed."""
    session = Session(run)
    for step in range(2):
        session.step(step)
    world, model, optimizers = session.world, session.model, session.optimizers
    tensors = [
        tensor
        for table in model.tables
        for tensor in (table.shard.values, *optimizers.tables[table.name].state.values())
    ]
    before = [tensor.clone() for tensor in tensors]
    copies.check_copies(run, model, optimizers, 1000)
    unchanged = all(map(torch.equal, before, tensors))
    if world.rank == where:
        if what == "exp_avg_sq":
            # The last bit of one number.
            optimizers.tables["memory.values"].state[what].view(torch.int32)[5, 2] ^= 1
        elif what == "values":
            model.tables[-1].shard.values[7:9, 0] += 1.0
        else:
            for logical in logical_parameters(model.chunks[0], tp=1, tp_rank=0, ep_rank=0):
                if logical.name == what:
                    assert logical.dim is None
                    logical.param.data[3, 1] += 1.0
    said = ""
    # It is not the turn of anything.
    copies.check_copies(run, model, optimizers, 1001)
    try:
        copies.check_copies(run, model, optimizers, 2000)
    except MemparError as error:
        said = str(error)
    bringup.tear_down(world)
    return unchanged, said


CASES: dict[str, tuple[int, RunConfig, int, str, str]] = {
    # Row shards of 72 slots: rank 3 holds the second one's second copy.
    "replica": (
        4,
        toy_run(mp=2, mp_rows=2),
        3,
        "exp_avg_sq",
        r"memory\.values\.exp_avg_sq from slot 77 on, between ranks \[1\] and \[3\]",
    ),
    "stage copy": (2, toy_run(pp=2), 1, "values", r"memory\.values from slot 7 on, between ranks \[0\] and \[1\]"),
    "second memory": (
        2,
        toy_run(kind="two", mp=1),
        1,
        "values",
        r"memory1\.down from slot 7 on, between ranks \[0\] and \[1\]",
    ),
    "majority": (
        3,
        toy_run(micro_batches=3, optimizer="adamw"),
        1,
        "values",
        r"memory\.values from slot 7 on, between ranks \[0, 2\] and \[1\]",
    ),
    "dense": (
        4,
        toy_run(tp=2, dtype="bf16"),
        2,
        NORM,
        rf"{re.escape(NORM)} from row 3 on, between ranks \[0\] and \[2\]; "
        rf"{re.escape(NORM)} from row 3 on, between ranks \[2\] and \[3\]",
    ),
    "dense, tensor-parallel copies": (
        2,
        toy_run(tp=2, sequence_parallel=True),
        1,
        NORM,
        rf"{re.escape(NORM)} from row 3 on, between ranks \[0\] and \[1\]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_changed_element_of_one_copy_is_named_on_every_rank(case: str, pool: RankPool) -> None:
    world_size, run, where, what, message = CASES[case]
    seen = pool.run(world_size, corrupt_and_check, run, where, what)
    for unchanged, said in seen:
        assert unchanged
        assert re.match(rf"copies differ after step 2000: {message}\. They are updated alike", said), said
