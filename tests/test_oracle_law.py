"""The oracle law: the engine on one rank computes what a page of plain torch computes (tests/oracle.py).

Losses and the gradient of every parameter and of the table in the first step, then three steps of
training: losses, norms, and the parameters that they lead to. The oracle computes in float64 from the
engine's own initial values, because in float32 its rounding is larger than the engine's (up to 9e-5 of
a gradient against 3e-6).
"""

from typing import Any

import numpy as np
import pytest
import torch

import oracle
from layout_runs import gradient_deviations
from mempar.runtime.config import RunConfig
from mempar.runtime.slot_trace import SlotTrace
from oracle_runs import oracle_config, oracle_optim
from rank_pool import RankPool
from toy import TABLE, History, batches_of, joined, toy_run, train

# The oracle's operations are too small to share between threads.
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
# Adam divides by the square root of tiny second moments, which lifts rounding: an update is lr times the
# sign of a gradient that may be all rounding, and a parameter of size 0.02 moves by 0.001 a step.
PARAMETER_TOLERANCE = {"float32": 1e-3, "float64": 1e-9}

# "ragged" runs have grouped queries, the others as many groups as heads; "extras" are qk_norm and scalar_gate.
RUNS: dict[str, dict[str, Any]] = {
    "dense-untied-mha": {"kind": "dense"},
    "dense-tied-gqa": {"kind": "dense", "tied": True, "ragged": True},
    "memory-row_adam-untied-mha": {"kind": "memory"},
    "memory-adamw-tied-gqa-norms-gate": {
        "kind": "memory",
        "optimizer": "adamw",
        "tied": True,
        "ragged": True,
        "extras": True,
    },
    "memory_plus-row_adam-untied-gqa": {"ragged": True},
    "memory_plus-adamw-untied-mha": {"optimizer": "adamw"},
    "memory_plus-row_adam-tied-mha-norms-gate": {"tied": True, "extras": True},
    "memory_plus-row_adagrad-untied-gqa-joint-clip": {
        "optimizer": "row_adagrad",
        "ragged": True,
        "memory": {"clip": "joint", "weight_decay": 0.3},
    },
    "memory_plus-adamw-untied-gqa-norms-gate": {"optimizer": "adamw", "ragged": True, "extras": True},
    "peer-row_adam-untied-gqa": {"kind": "peer", "ragged": True},
    "peer-adamw-tied-mha-norms-gate": {"kind": "peer", "optimizer": "adamw", "tied": True, "extras": True},
    "beside-row_adam-untied-gqa": {"kind": "beside", "ragged": True},
    "two-row_adam-untied-mha": {"kind": "two"},
    "moe-untied-mha": {"kind": "moe"},
    "moe-one-expert-a-token-tied-gqa": {"kind": "moe", "ragged": True, "tied": True, "experts": {"top_k": 1}},
    "memory_plus+moe-row_adam-untied-gqa": {"kind": "memory_plus+moe", "ragged": True},
}


def oracle_batches(run: RunConfig, step: int) -> list[oracle.Batch]:
    return [(batch.tokens, batch.labels, batch.loss_mask.double()) for batch in batches_of(run, step)]


def oracle_slots(run: RunConfig, trace: SlotTrace, step: int) -> list[oracle.Slots]:
    layers = [layer for memory in run.memories.values() for layer in memory.layers]
    return [
        {
            layer: torch.from_numpy(np.stack([trace.slots[step, layer, sample] for sample in batch.sample_ids])).long()
            for layer in layers
        }
        for batch in batches_of(run, step)
    ]


def torch_params(parameters: dict[str, np.ndarray]) -> oracle.Params:
    return {name: torch.from_numpy(value.copy()).double() for name, value in parameters.items()}


@pytest.fixture(scope="module", params=[(name, dtype) for name in RUNS for dtype in TOLERANCE], ids="-".join)
def engine(request: pytest.FixtureRequest, pool: RankPool) -> tuple[History, oracle.Params]:
    """A run of the engine, and the values it started from."""
    name, dtype = request.param
    run = toy_run(dtype=dtype, micro_batches=3, **RUNS[name])
    start, trained = (
        pool.submit(1, train, run, 0, None, ("parameters",)),
        pool.submit(1, train, run, STEPS, None, ("gradients", "slots", "parameters")),
    )
    return joined(run, trained.result()), torch_params(joined(run, start.result()).parameters)


def test_first_step_gradients_match_oracle(engine: tuple[History, oracle.Params], note_figure) -> None:
    history, params = engine
    run, tolerance = history.run, TOLERANCE[history.run.train.dtype]
    config, batches = oracle_config(run), oracle_batches(run, 0)
    replay = oracle_slots(run, history.trace, 0)
    loss, gradients, _ = oracle.gradients(params, batches, config, replay)
    assert history.reports[0].loss == pytest.approx(loss.item(), rel=tolerance, abs=0)
    assert (TABLE in gradients) == run.memory.enabled
    deviations = gradient_deviations(
        history.gradients, {name: gradient.numpy() for name, gradient in gradients.items()}
    )
    note_figure(f"oracle law, {run.train.dtype}: gradients", max(deviations.values()))
    assert {name: value for name, value in deviations.items() if value > tolerance} == {}


def test_chosen_slots_match_oracle(engine: tuple[History, oracle.Params]) -> None:
    history, params = engine
    run = history.run
    if not run.memory.enabled:
        assert not history.trace.slots
        return
    _, _, chosen = oracle.gradients(params, oracle_batches(run, 0), oracle_config(run))
    flips = total = 0
    for ours, theirs in zip(oracle_slots(run, history.trace, 0), chosen, strict=True):
        assert ours.keys() == theirs.keys()
        for layer in ours:
            flips += int((ours[layer] != theirs[layer]).any(-1).sum())
            total += ours[layer][..., 0].numel()
    # In float32 near ties may fall either way.
    assert flips <= (0 if run.train.dtype == "float64" else total // 500)


def test_training_matches_oracle(engine: tuple[History, oracle.Params], note_figure) -> None:
    history, start = engine
    run, dtype = history.run, history.run.train.dtype
    params = {name: param.clone() for name, param in start.items()}
    state, config, optim = oracle.OptimState(), oracle_config(run), oracle_optim(run)
    for step, report in enumerate(history.reports):
        batches, replay = oracle_batches(run, step), oracle_slots(run, history.trace, step)
        expected = oracle.step(params, state, batches, config, optim, run.memory.optimizer, replay)
        for name in ("loss", "grad_norm", "memory_grad_norm"):
            assert getattr(report, name) == pytest.approx(expected[name], rel=TOLERANCE[dtype], abs=0), (step, name)
        assert report.tokens == sum(int(mask.sum()) for _, _, mask in batches)
    # What training changed, not what it started from, is compared.
    deviations = gradient_deviations(
        {name: value - start[name].numpy() for name, value in history.parameters.items()},
        {name: (param - start[name]).numpy() for name, param in params.items()},
    )
    note_figure(f"oracle law, {dtype}: change of parameters in {STEPS} steps", max(deviations.values()))
    assert {name: value for name, value in deviations.items() if value > PARAMETER_TOLERANCE[dtype]} == {}


def test_balance_loss_matches_oracle(pool: RankPool, note_figure) -> None:
    # Only its gradient is seen: the loss that is reported is that of the tokens. In float64 it is refused.
    run = toy_run(kind="moe", micro_batches=3, experts={"aux_loss": 0.5, "layers": (0, 3)})
    start, stepped = (
        joined(run, pool.run(1, train, run, steps, None, keep))
        for steps, keep in ((0, ("parameters",)), (1, ("gradients",)))
    )
    loss, gradients, _ = oracle.gradients(torch_params(start.parameters), oracle_batches(run, 0), oracle_config(run))
    assert stepped.reports[0].loss == pytest.approx(loss.item(), rel=TOLERANCE["float32"], abs=0)
    deviations = gradient_deviations(
        stepped.gradients, {name: gradient.numpy() for name, gradient in gradients.items()}
    )
    note_figure("oracle law, float32: gradients with balance loss", max(deviations.values()))
    assert {name: value for name, value in deviations.items() if value > TOLERANCE["float32"]} == {}
