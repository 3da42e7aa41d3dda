"""Checkpoints that universal ones are made of, and the conversion without its command."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempar.runtime.checkpoint.boxes import Box
from mempar.tools.convert.deepspeed import plan_deepspeed
from mempar.tools.convert.source import Source

# What is trained, and on how many ranks.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {"ragged": True, "extras": True}),
    "distributed": (2, {"ragged": True, "extras": True, "tp": 2, "distributed_optimizer": True}),
    "bf16": (2, {"kind": "beside", "dtype": "bf16", "distributed_optimizer": True}),
    "two-row_adagrad": (1, {"kind": "two", "dtype": "bf16", "optimizer": "row_adagrad", "tied": True}),
    "bf16-without-master": (
        1,
        {"kind": "beside", "dtype": "bf16", "memory": {"moments_dtype": "bf16", "rounding": "stochastic"}},
    ),
    "peer-adamw": (1, {"kind": "peer", "optimizer": "adamw"}),
    "moe": (2, {"kind": "memory_plus+moe", "ep": 2}),
}
# Little enough for every tensor to be written in several blocks.
MEMORY_BYTES = 1 << 13


def make_universal(source: Source, directory: Path, memory_bytes: int = MEMORY_BYTES) -> None:
    """Carry a plan out."""
    plan = plan_deepspeed(source, memory_bytes=memory_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    plan.prepare(directory)
    written: list[int] = []
    results = {job.key: job.run(directory, written.append) for job in plan.jobs}
    assert sum(written) == sum(job.bytes_written for job in plan.jobs)
    plan.finish(directory, results)


def folder_in(directory: Path) -> Path:
    return directory / (directory / "latest_universal").read_text()


def whole(source: Source, name: str) -> Tensor:
    """Read a tensor."""
    record = source.tensors[name]
    numbers = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
    source.read(box_of(source, name, (0,) * len(record.shape), record.shape), numbers)
    return numbers


def box_of(source: Source, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    record = source.tensors[name]
    return Box(name=name, dtype=record.dtype, shape=record.shape, offset=offset, sizes=sizes)
