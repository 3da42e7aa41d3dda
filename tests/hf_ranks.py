"""What ranks do for the tests of conversions to and from Hugging Face: the engine's logits, by models from anywhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempar.runtime.bringup import tear_down
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.config import RunConfig
from mempar.runtime.logical import own_parameters
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.hf.from_hf import HfSource
from mempar.tools.convert.plan import Plan
from mempar.tools.convert.source import Source
from mempar.tools.convert.with_memory import WithMemory
from toy import Session, batches_of, readable
from toy_checkpoints import save_checkpoint

# Megatron's names of parameters that checkpoints hold under others.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def train_and_save(run: RunConfig, target: Path, steps: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Train a little and save; returns the tokens of a batch and the engine's logits of them."""
    session = Session(run)
    session.optimizers.watching = False
    for step in range(steps):
        session.step(step)
    save_checkpoint(target, run, session, {"step": steps, "applied_steps": steps, "tokens": 7})
    return session_logits(session)


def logits_of(make: Callable[..., Source], *args: Any, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a batch, and the logits of the engine with a source's weights."""
    source = make(*args)
    train = replace(source.run.train, seq_length=length, micro_batch_size=1, global_batch_size=2)
    session = Session(replace(source.run, train=train))
    with torch.no_grad():
        for logical in own_parameters(session.model.chunks):
            logical.param.copy_(_of_parameter(source, logical.name))
        for table in session.model.tables:
            table.shard.values.copy_(whole(source, table.name))
    return session_logits(session)


def hf_source(root: Path) -> Source:
    """A model of transformers'."""
    return HfSource(root)


def hf_source_with_memory(root: Path, assignments: list[str]) -> Source:
    """The same with memory layers."""
    return WithMemory(HfSource(root), assignments)


def checkpoint_with_memory(root: Path, assignments: list[str]) -> Source:
    """A checkpoint of ours with memory layers."""
    return WithMemory(CheckpointSource(root), assignments)


def whole(source: Source, name: str) -> Tensor:
    """A tensor of a source."""
    record = source.tensors[name]
    tensor = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
    zeros = (0,) * len(record.shape)
    source.read(Box(name=name, dtype=record.dtype, shape=record.shape, offset=zeros, sizes=record.shape), tensor)
    return tensor


def carry_out(plan: Plan, directory: Path) -> None:
    """Do all that a plan says, the last job first."""
    plan.prepare(directory)
    done = []
    results = {job.key: job.run(directory, done.append) for job in reversed(plan.jobs)}
    assert sum(done) == sum(job.bytes_written for job in plan.jobs)
    for job in plan.jobs:
        assert (directory / job.key).stat().st_size == job.bytes_written
    plan.finish(directory, results)


def initial_parameters(run: RunConfig) -> dict[str, np.ndarray]:
    """What the engine draws for a run, by the names of checkpoints."""
    session = Session(run)
    found = {_saved_name(p.name): p.param.detach().float().numpy().copy() for p in own_parameters(session.model.chunks)}
    found |= {table.name: table.shard.values.float().numpy().copy() for table in session.model.tables}
    tear_down(session.world)
    return found


def _saved_name(name: str) -> str:
    for ours, saved in _NORMS.items():
        name = name.removesuffix(ours) + saved if name.endswith(ours) else name
    return name


def _of_parameter(source: Source, name: str) -> Tensor:
    before, mark, expert = name.partition(".mlp.experts.")
    if mark:
        number, _, part = expert.partition(".")
        return whole(source, f"{before}.mlp.experts.experts.{part}")[int(number)]
    return whole(source, _saved_name(name))


def session_logits(session: Session) -> tuple[np.ndarray, np.ndarray]:
    batch = session.model.in_flight.current = batches_of(session.run, 0)[0]
    chunk = session.model.wrapped[0].eval()
    with torch.no_grad():
        logits = chunk(batch.tokens, batch.position_ids, None)
    session.model.in_flight.finish()
    tear_down(session.world)
    return batch.tokens.numpy().copy(), logits.to(readable(logits)).numpy().copy()
