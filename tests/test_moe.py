"""Mixtures of experts (mempar.runtime.experts): what is refused, and one test for each trap that would be silent.

That they compute the right thing is the oracle law's and the layout law's (test_oracle_law.py, test_layout_law.py).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mempar.errors import CheckpointError, ConfigError
from mempar.parallel.ranks import RankGrid
from mempar.runtime import bringup, mcore
from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.accept import check_config
from mempar.runtime.config import ModelConfig, RunConfig, TrainConfig
from mempar.runtime.float64 import keep_wide_routing
from mempar.runtime.logical import logical_parameters
from mempar.runtime.model import build_model, transformer_config
from mempar.runtime.moe_config import MoeConfig
from mempar.runtime.optim import StepReport
from mempar.runtime.placement import place
from mempar.runtime.size import model_size
from rank_pool import RankPool
from toy import TABLE, VOCAB, Session, joined, toy_run, train
from toy_checkpoints import load_into, save_checkpoint

TP2SP = {"tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoeConfig(num_experts=-1), r"moe\.num_experts=-1 must be at least 0"),
        (lambda: MoeConfig(num_experts=2, top_k=3), r"moe\.top_k=3 exceeds moe\.num_experts=2"),
        (lambda: MoeConfig(top_k=0), r"moe\.top_k=0 must be at least 1"),
        (lambda: MoeConfig(layers=(2, 1)), r"moe\.layers=\[2, 1\] must be distinct and ascending"),
        (lambda: MoeConfig(aux_loss=math.inf), r"moe\.aux_loss=inf"),
        (lambda: toy_run(kind="dense", ep=2), r"parallel\.ep=2 with moe\.num_experts=0"),
        (lambda: toy_run(kind="moe", ep=3), r"parallel\.ep=3 does not divide moe\.num_experts=4"),
        (lambda: toy_run(kind="moe", experts={"layers": (4,)}), r"moe\.layers=\[4\] leaves the model's blocks 0 to 3"),
        (
            lambda: toy_run(kind="memory_plus+moe", experts={"layers": (0, 1)}),
            r"names the blocks \[1\], which have memory",
        ),
        (lambda: toy_run(kind="moe", tp=2), r"needs parallel\.sequence_parallel=true"),
        (lambda: toy_run(kind="moe", experts={"ffn_hidden_size": 21}, **TP2SP), r"moe\.ffn_hidden_size=21"),
        (lambda: toy_run(kind="moe", experts={"aux_loss": 0.1}, dtype="float64"), "computes this loss in float32"),
        (lambda: place(toy_run(kind="moe", ep=4), 6), r"cp\*dp = 1\*6 = 6 on 6 ranks; use parallel\.ep=1, 2, 3, 6"),
        (lambda: place(toy_run(kind="moe", ep=2, **TP2SP), 2), r"cp\*dp = 1\*1 = 1 on 2 ranks"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_model_whose_blocks_are_all_memory_has_no_room_for_experts() -> None:
    memory = toy_run().memory
    with pytest.raises(ConfigError, match="leaves none for experts"):
        RunConfig(
            model=ModelConfig(num_layers=4), memory=memory.__class__(layers=(0, 1, 2, 3)), moe=MoeConfig(num_experts=2)
        )


def test_experts_take_the_blocks_that_memory_leaves() -> None:
    run = toy_run(kind="memory_plus+moe")
    assert (run.memory_layers, run.moe_layers) == ((1, 3), (0, 2))
    assert toy_run(kind="moe", experts={"layers": ()}).moe_layers == (0, 1, 2, 3)
    assert toy_run(experts={"layers": (0,)}).moe_layers == ()
    assert (
        "4 experts in each of the blocks 0, 2, 2 on each rank (ep=2)"
        in place(toy_run(kind="memory_plus+moe", ep=2), 2).reason
    )


def test_smallest_world_divides_the_experts_and_the_table() -> None:
    assert toy_run(kind="moe", ep=2).parallel.smallest_world == 2
    assert toy_run(kind="moe", ep=2, pp=2, **TP2SP).parallel.smallest_world == 8
    assert toy_run(kind="memory_plus+moe", ep=2, mp=3).parallel.smallest_world == 6


def expert_ranks(run: RunConfig) -> tuple[int, int, int]:
    """This rank, its place among the shares of the experts and among their copies, as megatron has it."""
    world, state = bringup.lay_out(run), mcore.parallel_state
    found = dist.get_rank(), state.get_expert_model_parallel_rank(), state.get_expert_data_parallel_rank()
    tear_down(world)
    return found


@pytest.mark.parametrize(("world_size", "sizes"), [(4, {"ep": 2}), (8, {"ep": 2, **TP2SP})], ids=["dp", "tp"])
def test_rank_arithmetic_is_megatrons(world_size: int, sizes: dict[str, Any], pool: RankPool) -> None:
    # Otherwise norms would count some experts twice and others never.
    run = toy_run(kind="moe", **sizes)
    grid = RankGrid(world=world_size, tp=run.parallel.tp, pp=run.parallel.pp, ep=run.parallel.ep)
    for rank, *places in pool.run(world_size, expert_ranks, run):
        assert places == [grid.expert_rank(rank), grid.expert_dp_rank(rank)]


@pytest.mark.parametrize("distributed", [False, True])
def test_each_expert_counts_once_in_the_gradient_norm(distributed: bool, pool: RankPool) -> None:
    run = toy_run(kind="memory_plus+moe", ep=2, distributed_optimizer=distributed)
    history = joined(run, pool.run(4, train, run, 1, None, ("gradients",)))
    experts = {name.split(".")[5] for name in history.gradients if ".experts." in name}
    assert experts == {"0", "1", "2", "3"}
    squares = (np.square(grad, dtype=np.float64).sum() for name, grad in history.gradients.items() if name != TABLE)
    assert history.reports[0].grad_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


def test_routing_weights_keep_float64_and_nothing_else() -> None:
    # Megatron rounds them to float32, which the oracle law would see: the strict legs promise float64.
    keep_wide_routing(mcore.moe_router)
    route = mcore.moe_router.topk_routing_with_score_function
    keep_wide_routing(mcore.moe_router)
    assert mcore.moe_router.topk_routing_with_score_function is route
    logits = torch.randn(50, 6, dtype=torch.float64)
    best, expert = logits.topk(2)
    for pre_softmax, expected in ((False, best.softmax(-1)), (True, logits.softmax(-1).gather(1, expert))):
        weights, chosen = route(logits, 2, use_pre_softmax=pre_softmax)
        assert weights.dtype == torch.float64
        torch.testing.assert_close(weights.gather(1, expert), expected, rtol=1e-15, atol=0)
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, expert, True))
        assert not weights[~chosen].any()
        narrow, _ = route(logits.float(), 2, use_pre_softmax=pre_softmax)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "router"), [("bf16", "fp32"), ("float32", "fp32"), ("float64", "fp64")])
def test_router_computes_in_float32_at_least(dtype: str, router: str) -> None:
    # In bf16 logits of different experts are equal every so often.
    assert transformer_config(toy_run(kind="moe", dtype=dtype)).moe_router_dtype == router


def uneven_collectives(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather and reduce-scatter `counts` rows of the ranks, forward and backward."""
    world = bringup.lay_out(toy_run(kind="moe", **TP2SP))
    group, mappings = mcore.parallel_state.get_tensor_model_parallel_group(), mcore.tensor_parallel.mappings
    rank = world.rank
    part = (torch.arange(2.0 * counts[rank]).view(-1, 2) + 100 * rank).requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(part, group=group, output_split_sizes=counts)
    (gathered * (rank + 1)).sum().backward()
    whole = (torch.arange(2.0 * sum(counts)).view(-1, 2) * (rank + 1)).requires_grad_()
    reduced = mappings.reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=counts)
    (reduced * (rank + 1)).sum().backward()
    assert part.grad is not None and whole.grad is not None
    tear_down(world)
    return gathered.detach(), part.grad, reduced.detach(), whole.grad


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [2, 2]], ids=str)
def test_tensor_ranks_gather_uneven_numbers_of_tokens(counts: list[int], pool: RankPool) -> None:
    # Experts cut over tensor ranks do so; gloo alone refuses, or worse.
    parts = [torch.arange(2.0 * count).view(-1, 2) + 100 * rank for rank, count in enumerate(counts)]
    sums = torch.arange(2.0 * sum(counts)).view(-1, 2) * 3
    weights = torch.cat([torch.full((count, 2), rank + 1.0) for rank, count in enumerate(counts)])
    for rank, (gathered, grad, reduced, whole_grad) in enumerate(pool.run(2, uneven_collectives, counts)):
        assert torch.equal(gathered, torch.cat(parts))
        assert torch.equal(grad, torch.full_like(parts[rank], 3.0))
        assert torch.equal(reduced, sums.split(counts)[rank])
        assert torch.equal(whole_grad, weights)


def marks(run: RunConfig) -> dict[str, tuple[bool, bool, int | None, tuple[int, ...]]]:
    """For each parameter of experts: separate, sequence-parallel, split dimension, whole shape."""
    session = Session(run)
    grid, rank = session.grid, session.world.rank
    found = {
        logical.name: (
            not getattr(logical.param, "allreduce", True),
            bool(getattr(logical.param, "sequence_parallel", False)),
            logical.dim,
            logical.shape,
        )
        for chunk in session.model.chunks
        for logical in logical_parameters(chunk, tp=grid.tp, tp_rank=grid.tp_rank(rank), ep_rank=grid.expert_rank(rank))
        if ".router." in logical.name or ".experts." in logical.name
    }
    tear_down(session.world)
    return found


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_carry_the_marks_that_sum_their_gradients(ep: int, pool: RankPool) -> None:
    # Marked by megatron beyond one expert-parallel rank only; checkpoints are laid out by it.
    run = toy_run(kind="moe", ep=ep, experts={"layers": (2,)}, **TP2SP)
    block = "decoder.layers.2.mlp"
    for rank, found in enumerate(pool.run(4, marks, run)):
        expected: dict[str, Any] = {f"{block}.router.weight": (False, True, None, (4, 24))}
        for expert in range(4) if ep == 1 else range(2 * (rank // 2), 2 * (rank // 2) + 2):
            expected[f"{block}.experts.{expert}.linear_fc1.weight"] = (True, False, 0, (40, 24))
            expected[f"{block}.experts.{expert}.linear_fc2.weight"] = (True, False, 1, (24, 20))
        assert found == expected


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(4, {"ep": 4}), (4, {"ep": 2, **TP2SP})],
    ids=["ep4", "tp2sp-ep2"],
)
def test_initial_experts_do_not_depend_on_layout(world_size: int, sizes: dict[str, Any], pool: RankPool) -> None:
    run, single = toy_run(kind="memory_plus+moe", **sizes), toy_run(kind="memory_plus+moe")
    found = joined(run, pool.run(world_size, train, run, 0, None, ("parameters",))).parameters
    expected = joined(single, pool.run(1, train, single, 0, None, ("parameters",))).parameters
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    first, second = (expected[f"decoder.layers.2.mlp.experts.{expert}.linear_fc1.weight"] for expert in (0, 1))
    assert np.abs(first - second).max() > 0.01


def balance_losses(run: RunConfig) -> tuple[int, int]:
    """Entries of megatron's global record of balance losses, in a run and after it."""
    session = Session(run)
    session.step(0)
    tracker = mcore.moe_utils.get_moe_layer_wise_logging_tracker()
    during = len(tracker)
    tear_down(session.world)
    return during, len(tracker)


def test_balance_loss_leaves_nothing_behind(pool: RankPool) -> None:
    # Megatron's record of it keeps process groups alive.
    assert pool.run(2, balance_losses, toy_run(kind="moe", ep=2, experts={"aux_loss": 0.1})) == [(1, 0)] * 2


META = {"step": 2, "applied_steps": 2, "tokens": 0}


def train_and_save(run: RunConfig, path: Path) -> tuple[StepReport, dict[str, np.ndarray]]:
    """Train two steps, save, train a third one."""
    session = Session(run)
    session.optimizers.watching = False
    for step in range(2):
        session.step(step)
    save_checkpoint(path, run, session, META)
    return third_step(session)


def load_and_train(run: RunConfig, path: Path) -> tuple[StepReport, dict[str, np.ndarray]]:
    """Load, and train the third step."""
    session = Session(run)
    session.optimizers.watching = False
    load_into(session, path)
    return third_step(session)


def third_step(session: Session) -> tuple[StepReport, dict[str, np.ndarray]]:
    report = session.step(2)
    parameters = {
        name: param.detach().float().numpy().copy() if param.dtype == torch.bfloat16 else param.detach().numpy().copy()
        for chunk in session.model.chunks
        for name, param in chunk.named_parameters()
    }
    tear_down(session.world)
    return report, parameters


# Experts on the last stage alone: rank 0, which speaks for all in a checkpoint, has no optimizer of experts.
LAST_STAGE = {"kind": "moe", "experts": {"layers": (2, 3)}, "pp": 2}


@pytest.mark.parametrize(
    ("world_size", "model"),
    [
        (2, {"kind": "memory_plus+moe", "ep": 2, "mp": 2, "mp_rows": 2}),
        (2, LAST_STAGE),
        (2, {**LAST_STAGE, "dtype": "bf16"}),
        (4, {**LAST_STAGE, "distributed_optimizer": True, "ep": 2}),
    ],
    ids=["ep2-mp2", "last-stage", "last-stage-bf16", "last-stage-distributed-optimizer"],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    world_size: int, model: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    run, path = toy_run(**model), tmp_path / "step_00000002"
    expected = pool.run(world_size, train_and_save, run, path)
    for (report, parameters), (known, values) in zip(
        pool.run(world_size, load_and_train, run, path), expected, strict=True
    ):
        assert report == known
        assert parameters.keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(parameters[name], value, err_msg=name)


@pytest.mark.parametrize("distributed", [False, True])
def test_experts_are_continued_at_another_expert_parallel_size(
    distributed: bool, pool: RankPool, tmp_path: Path
) -> None:
    precision = {"distributed_optimizer": True} if distributed else {"dtype": "float64"}
    sizes = [(2, {"ep": 2}), (1, {}), (4, {"ep": 2, **TP2SP})]
    runs = [(world_size, toy_run(kind="memory_plus+moe", **precision, **size)) for world_size, size in sizes]
    limit = 1e-5 if distributed else 1e-9
    # Both ways in float64; the distributed optimizer's states are gathered alike whatever the layout.
    for number, (world_size, run) in enumerate(runs[: 1 if distributed else 2]):
        path = tmp_path / str(number) / "step_00000002"
        (expected, _), *_ = pool.run(world_size, train_and_save, run, path)
        for other_size, other in runs:
            if other is run:
                continue
            for report, _ in pool.run(other_size, load_and_train, other, path):
                assert report.loss == pytest.approx(expected.loss, rel=limit, abs=0)
                assert report.grad_norm == pytest.approx(expected.grad_norm, rel=10 * limit, abs=0)


def test_checkpoint_of_other_experts_is_refused(tmp_path: Path) -> None:
    saved = toy_run(kind="moe", ep=2)
    check_config(tmp_path, saved, toy_run(kind="moe"))
    with pytest.raises(CheckpointError, match=r"moe\.num_experts is 4 there and 8 here"):
        check_config(tmp_path, saved, toy_run(kind="moe", experts={"num_experts": 8}))
    with pytest.raises(CheckpointError, match=r"moe\.num_experts is 4 there and 0 here"):
        check_config(tmp_path, saved, toy_run(kind="dense"))


def count_built(run: RunConfig) -> int:
    world = bringup.lay_out(run)
    model = build_model(run, world, VOCAB)
    tear_down(world)
    return sum(param.numel() for chunk in model.chunks for param in chunk.parameters())


def test_sizes_count_chosen_and_idle_experts(pool: RankPool) -> None:
    run = toy_run(kind="moe")
    size = model_size(run, VOCAB)
    assert pool.run(1, count_built, run) == [size.total_params]
    expert = 3 * 24 * 20
    assert size.total_params - size.active_params == 3 * 2 * expert
    # Four experts of which two are chosen, against one FFN of the same width as both.
    dense = RunConfig(
        model=run.model.__class__(**{**vars(run.model), "ffn_hidden_size": 40}), train=TrainConfig(seq_length=16)
    )
    wide = model_size(dense, VOCAB).flops_per_token + 6 * 3 * 24 * (48 - 40)
    assert size.flops_per_token - wide == 6 * 3 * 24 * 4
