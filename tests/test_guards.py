"""One test for each trap of the engine that would be silent: wrong numbers without an error.

Each name says what would happen. What the laws would catch is tested here too, where the cause is.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.runtime import mcore
from mempar.runtime import model as runtime_model
from mempar.runtime.blocks import RMSNorm
from mempar.runtime.bringup import check_engine, tear_down
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import logical_parameters
from mempar.runtime.memory_mlp import MemoryMLP
from mempar.runtime.model import transformer_config
from rank_pool import RankPool
from toy import TABLE, Session, batches_of, joined, toy_run, train
from toy_checkpoints import load_into, save_checkpoint

# What megatron holds split over tensor-parallel ranks, and along which dimension.
SPLIT_PARAMETERS = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc2.weight": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp2sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp4": (4, {"pp": 4}),
    "mp2c": (2, {"mp": 2, "mp_rows": 1}),
    "mp3r": (3, {"mp": 3, "mp_rows": 3}),
    "tp2pp2-mp4g": (8, {"tp": 2, "pp": 2, "mp": 4, "mp_rows": 2}),
    "distributed-optimizer": (2, {"distributed_optimizer": True}),
}


def test_interleaving_has_overlapped_p2p() -> None:
    # Without it the gradients of vpp=2, pp=2 are wrong; plain 1F1B refuses it.
    interleaved, plain = transformer_config(toy_run(pp=2, vpp=2)), transformer_config(toy_run(pp=2))
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)


def test_context_parallelism_is_refused_without_transformer_engine() -> None:
    with patch.object(mcore, "HAS_TRANSFORMER_ENGINE", False), pytest.raises(ConfigError, match=r"parallel\.cp=2"):
        check_engine(toy_run(cp=2))
    check_engine(toy_run())


def test_float64_is_refused_with_distributed_optimizer() -> None:
    # Its states would be float32.
    with pytest.raises(ConfigError, match="float64"):
        toy_run(dtype="float64", distributed_optimizer=True)
    toy_run(dtype="float32", distributed_optimizer=True)


def marks_of_parameters(run: RunConfig) -> dict[str, tuple[bool, bool, int | None]]:
    """For each parameter on this rank: sequence-parallel, tensor-parallel, and along which dimension."""
    session = Session(run)
    marks = {
        logical.name: (
            bool(getattr(logical.param, "sequence_parallel", False)),
            bool(getattr(logical.param, "tensor_model_parallel", False)),
            logical.dim,
        )
        for chunk in session.model.chunks
        for logical in logical_parameters(chunk, tp=run.parallel.tp, tp_rank=0, ep_rank=0)
    }
    tear_down(session.world)
    return marks


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_carry_the_marks_that_sum_their_gradients(sequence_parallel: bool, pool: RankPool) -> None:
    # Unmarked, a norm's gradient would miss the other ranks' tokens, and a split parameter would count twice in norms.
    run = toy_run(extras=True, tp=2, sequence_parallel=sequence_parallel)
    for marks in pool.run(2, marks_of_parameters, run):
        for name, (in_sequence, split, dim) in marks.items():
            expected = next((dim for end, dim in SPLIT_PARAMETERS.items() if name.endswith(end)), None)
            assert (split, dim) == (expected is not None, expected), name
            assert in_sequence == (sequence_parallel and not split), name
        assert len([name for name in marks if name.endswith("norm.weight")]) == 2 * 4 + 1 + 2 * 3


def test_query_and_key_norms_avoid_megatrons_names(pool: RankPool) -> None:
    # Megatron gives q_layernorm and k_layernorm weight decay and sharding of its own.
    (marks,) = pool.run(1, marks_of_parameters, toy_run(extras=True))
    assert {"decoder.layers.1.mlp.query_norm.weight", "decoder.layers.1.mlp.key_norm.weight"} <= marks.keys()
    assert not [name for name in marks if "q_layernorm" in name or "k_layernorm" in name]


def divide_loss_in_place(run: RunConfig) -> tuple[list[float], list[float]]:
    session = Session(run)
    batch = batches_of(run, 0)[0]
    output, loss = session.stepper._forward(iter([batch]), session.model.wrapped[0])
    total, _, reported = loss(output)
    before = reported["sums"].tolist()
    total.data.div_(7.0)
    tear_down(session.world)
    return before, reported["sums"].tolist()


def test_reported_loss_survives_division_in_place(pool: RankPool) -> None:
    # Megatron's schedule divides the loss that it was given.
    ((before, after),) = pool.run(1, divide_loss_in_place, toy_run())
    assert before == after
    assert before[0] > 0


def save_and_load(run: RunConfig, path: Path) -> tuple[int, int, set[float], list[str]]:
    """Train two steps, save, load in a new session and train one step.

    Returns:
        Number of `step` tensors, number of distinct ones, their values, and differences to not having stopped.
    """
    session = Session(run)
    for step in range(2):
        session.step(step)
    meta = {"step": 2, "applied_steps": 2}
    save_checkpoint(path, run, session, meta)
    expected = session.step(2)
    tear_down(session.world)

    resumed = Session(run)
    load_into(resumed, path)
    found = resumed.step(2)
    steps = [
        state["step"]
        for member in resumed.optimizers.members
        for state in member.optimizer.state.values()
        if torch.is_tensor(state.get("step"))
    ]
    differences = [] if found == expected else [f"{found} is not {expected}"]
    for before, after in zip(session.model.chunks, resumed.model.chunks, strict=True):
        for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            if not torch.equal(one, other):
                differences.append(name)
    tear_down(resumed.world)
    return len(steps), len({tensor.data_ptr() for tensor in steps}), {float(tensor) for tensor in steps}, differences


@pytest.mark.parametrize("distributed", [False, True])
def test_loaded_adam_steps_are_not_shared(distributed: bool, pool: RankPool, tmp_path: Path) -> None:
    # One `step` tensor for all parameters is advanced by each of them.
    run = toy_run(distributed_optimizer=distributed)
    for count, distinct, values, differences in pool.run(2, save_and_load, run, tmp_path / "step_00000002"):
        assert count > 10
        assert distinct == count
        assert values == {3.0}
        assert not differences


def weight_decays(run: RunConfig) -> list[tuple[str, float]]:
    """The decay of each parameter in a step, by name."""
    session = Session(run)
    session.step(0)
    decay = {
        id(param): group["weight_decay"]
        for member in session.optimizers.members
        for group in member.param_groups
        for param in group["params"]
    }
    found = [(name, decay[id(param)]) for name, param in session.model.chunks[0].named_parameters()]
    tear_down(session.world)
    return found


def test_norms_and_biases_do_not_decay(pool: RankPool) -> None:
    # Megatron's multiplier of the decay is applied by its scheduler, which is not used here.
    run = toy_run(extras=True)
    (decays,) = pool.run(1, weight_decays, run)
    for name, decay in decays:
        assert decay == (0.0 if name.endswith(("norm.weight", ".bias")) else run.optim.weight_decay), name
    assert {decay for _, decay in decays} == {0.0, run.optim.weight_decay}


def test_padded_vocabulary_does_not_depend_on_tensor_parallelism() -> None:
    for tp in (1, 2):
        run = toy_run(tp=tp)
        assert run.model.padded_vocab(61) == 64
        assert run.model.padded_vocab(0) == 64
    assert replace(run.model, vocab_size=0).padded_vocab(65) == 80


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_values_do_not_depend_on_layout(layout: str, tied: bool, pool: RankPool) -> None:
    world_size, sizes = LAYOUTS[layout]
    run = toy_run(tied=tied, extras=True, micro_batches=12, **sizes)
    single = toy_run(tied=tied, extras=True, micro_batches=12)
    found = joined(run, pool.run(world_size, train, run, 0, None, ("parameters",))).parameters
    expected = joined(single, pool.run(1, train, single, 0, None, ("parameters",))).parameters
    assert found.keys() == expected.keys()
    assert TABLE in found
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def block_norms(run: RunConfig) -> list[tuple[Any, Any]]:
    """For each block its MLP's module and its norm, under a specification such as TransformerEngine's."""
    session = Session(run)
    fused = mcore.get_gpt_layer_local_spec(normalization="RMSNorm")
    # With TransformerEngine the norm before the MLP is part of linear_fc1, and nothing stands in its place.
    fused.submodules.pre_mlp_layernorm = "identity"
    with (
        patch.object(mcore, "HAS_TRANSFORMER_ENGINE", True),
        patch.object(mcore, "get_gpt_layer_with_transformer_engine_spec", lambda: copy.deepcopy(fused)),
    ):
        blocks = runtime_model._block_specs(run, session.model.transformer, session.model.access, None).layer_specs
    tear_down(session.world)
    return [(getattr(block.submodules.mlp, "module", None), block.submodules.pre_mlp_layernorm) for block in blocks]


@pytest.mark.parametrize("kind", ["memory_plus", "moe", "memory_plus+moe"])
def test_blocks_without_ffn_are_normed_where_the_norm_is_fused_into_it(kind: str, pool: RankPool) -> None:
    run = toy_run(kind=kind)
    (norms,) = pool.run(1, block_norms, run)
    modules = [module for module, _ in norms]
    assert [module is MemoryMLP for module in modules] == [block in run.memory_layers for block in range(4)]
    assert [module.__name__ == "MoELayer" for module in modules] == [block in run.moe_layers for block in range(4)]
    for block, (_, norm) in enumerate(norms):
        replaced = block in (*run.memory_layers, *run.moe_layers)
        assert norm is RMSNorm if replaced else norm == "identity"


def table_aliases(run: RunConfig) -> list[str]:
    """Names of parameters and buffers of the model that share memory with the table."""
    session = Session(run)
    storage = session.model.tables[0].shard.values.untyped_storage().data_ptr()
    found = [
        name
        for chunk in session.model.wrapped
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]
        if tensor.untyped_storage().data_ptr() == storage
    ]
    tear_down(session.world)
    return found


def test_table_is_no_parameter_of_the_model(pool: RankPool) -> None:
    # Megatron would cast it, broadcast one rank's shard over the others and allocate a dense gradient.
    for aliases in pool.run(2, table_aliases, toy_run(dtype="bf16", mp=2)):
        assert aliases == []


def default_group_size() -> int:
    return dist.get_world_size()


def test_groups_do_not_outlive_their_run(pool: RankPool) -> None:
    # A pool's next job may have another layout: nothing of the last one may be left.
    layouts = (4, {"tp": 2, "mp": 4, "mp_rows": 2}), (2, {"pp": 2}), (3, {"mp": 3}), (1, {})
    for world_size, sizes in layouts:
        run = toy_run(micro_batches=12, **sizes)
        reports = [seen.reports for seen in pool.run(world_size, train, run, 1)]
        assert all(report == reports[0] for report in reports)
        assert pool.run(world_size, default_group_size) == [world_size] * world_size
