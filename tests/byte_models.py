"""Toy models of bytes, for commands that read and write text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mempar.runtime.bringup import lay_out, tear_down
from mempar.runtime.checkpoint.loading import HISTORY_SINCE
from mempar.runtime.checkpoint.saving import Save
from mempar.runtime.config import RunConfig
from mempar.runtime.data.tokenizer import BYTE_VOCAB
from mempar.runtime.model import build_model
from mempar.runtime.optim import Optimizers
from toy import toy_run


def byte_run(seq_length: int = 40, **settings: Any) -> RunConfig:
    """A toy run on the 257 tokens of the byte tokenizer; settings as of `toy_run`."""
    run = toy_run(**settings)
    return replace(
        run, model=replace(run.model, vocab_size=0), train=replace(run.train, seq_length=seq_length, micro_batch_size=1)
    )


def save_byte_model(run: RunConfig, target: Path) -> None:
    """On every rank: save a run's initial values."""
    world = lay_out(run)
    model = build_model(run, world, BYTE_VOCAB)
    optimizers = Optimizers(run, world, model)
    meta = {"progress": {"step": 0, "applied_steps": 0}, HISTORY_SINCE: dict.fromkeys(optimizers.histories, 0)}
    Save(target, run, world, model, optimizers, meta).finish()
    tear_down(world)
