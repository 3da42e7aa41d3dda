"""Checkpoints of any size without training: a small dense model, and a table of made-up numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.memory.config import MemoryConfig
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.config import CheckpointConfig
from mempar.runtime.checkpoint.manifest import OPTIMIZER, WEIGHTS, TensorRecord
from mempar.runtime.config import ModelConfig, RunConfig
from mempar.tools.convert.conversion import Conversion
from mempar.tools.convert.layout import in_layout
from mempar.tools.convert.to_mempar import ToMempar

# Rows of made-up numbers that are repeated, each time with another first column.
_DRAWN_ROWS = 4096


class MadeUp:
    """A source of numbers that nobody trained: a table, its state if wanted, and one norm."""

    has_digests = False
    identity = "made up"

    def __init__(self, *, num_subkeys: int, value_dim: int, state: bool = False, block_bytes: int = 128 << 20) -> None:
        self.root = Path("made-up")
        self.run = RunConfig(
            model=ModelConfig(num_layers=4, hidden_size=value_dim, num_attention_heads=1, ffn_hidden_size=8),
            memory=MemoryConfig(layers=(1,), num_subkeys=num_subkeys, key_dim=2, column_tile=min(128, value_dim // 8)),
            checkpoint=CheckpointConfig(block_bytes=block_bytes),
        )
        shape = (num_subkeys**2, value_dim)
        self.tensors = {
            "memory.values": TensorRecord(dtype="float32", shape=shape, kind=WEIGHTS, digest=0),
            "decoder.final_layernorm.weight": TensorRecord(dtype="float32", shape=(value_dim,), kind=WEIGHTS, digest=0),
        }
        if state:
            for name in ("exp_avg", "exp_avg_sq"):
                self.tensors[f"memory.values.{name}"] = TensorRecord(
                    dtype="float32", shape=shape, kind=OPTIMIZER, digest=0
                )
        self.progress = {"step": 1, "applied_steps": 1}
        self.about: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(1)
        self._drawn = torch.randint(0, 1 << 30, (_DRAWN_ROWS, value_dim), generator=generator, dtype=torch.int32)

    def read(self, box: Box, target: Tensor) -> None:
        assert box.sizes == box.shape, "only whole tensors are read so"
        target.copy_(torch.ones(prod(box.sizes)).view(box.sizes))

    @contextmanager
    def stream(self, name: str, first: int, last: int) -> Iterator["_Rows"]:
        yield _Rows(self._drawn, first, len(name))

    def cuts(self, name: str) -> list[int]:
        return [0, self.tensors[name].shape[0]]

    def memory_bytes(self, name: str, *, at_cuts: bool = False) -> int:
        return 0

    def megatron(self) -> None:
        return None


class _Rows:
    def __init__(self, drawn: Tensor, first: int, salt: int) -> None:
        self._drawn, self._at, self._salt = drawn, first, salt

    def read(self, target: Tensor) -> None:
        numbers = target.view(torch.int32)
        done = 0
        while done < len(numbers):
            place = self._at % len(self._drawn)
            count = min(len(self._drawn) - place, len(numbers) - done)
            part = numbers[done : done + count].view(count, -1)
            part.copy_(self._drawn[place : place + count, : part.shape[1]])
            part[:, 0] = torch.arange(self._at, self._at + count, dtype=torch.int32) * 64 + self._salt
            done, self._at = done + count, self._at + count


def make_checkpoint(path: Path, source: MadeUp, layout: str) -> None:
    """Write a made-up checkpoint in a layout."""
    run, world = in_layout(source.run, layout.split())
    plan = ToMempar(source, run, world).plan(1 << 30)
    Conversion(plan=plan, identity="made up", source=source.root, destination=path, workers=2, max_memory=4 << 30).run(
        resume=False
    )
