"""Toy models of every kind: a checkpoint, its export to Hugging Face, the engine's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ranks import carry_out, train_and_save
from mempar.runtime.config import RunConfig
from mempar.tools.convert.checkpoint_source import CheckpointSource
from mempar.tools.convert.hf.to_hf import plan_hf
from rank_pool import RankPool
from toy import toy_run

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "dense-tied-gqa": {"kind": "dense", "tied": True, "ragged": True},
    "memory": {"kind": "memory"},
    "memory-tied-gqa-norms-gate": {"kind": "memory", "tied": True, "ragged": True, "extras": True},
    "memory_plus": {},
    "memory_plus-gqa-norms-gate": {"ragged": True, "extras": True},
    "memory_plus-bf16-scores": {"memory": {"score_dtype": "bf16"}},
    "memory_plus-bf16-table": {"memory": {"dtype": "bf16"}},
    "peer": {"kind": "peer"},
    "peer-norms-gate": {"kind": "peer", "ragged": True, "extras": True},
    "beside": {"kind": "beside", "ragged": True},
    "two": {"kind": "two"},
    "moe": {"kind": "moe", "ragged": True},
    "moe-one-expert-a-token": {"kind": "moe", "experts": {"top_k": 1}},
    "memory_plus+moe": {"kind": "memory_plus+moe"},
}


@dataclass(frozen=True)
class Exported:
    """A toy checkpoint, its export, and the engine's logits."""

    run: RunConfig
    saved: Path
    root: Path
    tokens: torch.Tensor
    logits: np.ndarray

    def load(self, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.root, trust_remote_code=True, **settings).eval()


def exporter(pool: RankPool, folders: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Returns a function that makes the checkpoint and the export of a model by its name, once."""
    made: dict[str, Exported] = {}

    def of(name: str, **settings: Any) -> Exported:
        key = f"{name} {settings}"
        if key not in made:
            folder = folders.mktemp(name.replace("+", "-"))
            run = toy_run(**{**MODELS[name], **settings})
            ((tokens, logits),) = pool.run(1, train_and_save, run, folder / "saved")
            source = CheckpointSource(folder / "saved")
            # A few rows at a time, in several files.
            carry_out(plan_hf(source, memory_bytes=1 << 13, max_shard_bytes=9000), folder / "hf")
            made[key] = Exported(run, folder / "saved", folder / "hf", torch.from_numpy(tokens), logits)
        return made[key]

    return of
