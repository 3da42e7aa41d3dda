"""Toy checkpoints to be inspected, and what ranks do for tests of `mempar inspect`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mempar.errors import MemparError
from mempar.runtime.bringup import tear_down
from mempar.runtime.config import RunConfig
from mempar.runtime.inference.opened import open_model
from mempar.runtime.mcore import IndexedDatasetBuilder
from mempar.runtime.memory_mlp import MemoryMLP
from mempar.tools.inspection import command
from mempar.tools.inspection.command import Request
from mempar.tools.inspection.texts import Asked
from toy import Session, toy_run
from toy_checkpoints import save_checkpoint

STEPS = 3


def make_run() -> RunConfig:
    """Bytes, a table of which some rows are never read, and two steps of coverage."""
    run = toy_run(kind="two", memory={"usage_interval": 2})
    memory = replace(run.memory, num_subkeys=37)
    return replace(run, name="toy <b>&amp;$x^2$", model=replace(run.model, vocab_size=257), memory=memory)


def train_and_save(run: RunConfig, path: Path) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """On a rank: train a few steps and save; returns what each step read, and the tables."""
    session = Session(run)
    for step in range(STEPS):
        session.step(step)
    save_checkpoint(path, run, session, {"step": STEPS, "applied_steps": STEPS})
    recorded = session.tracer.recorded.slots
    slots = {
        name: [
            np.concatenate(
                [found for (at, block, _), found in recorded.items() if at == step and block in memory.layers]
            )
            for step in range(STEPS)
        ]
        for name, memory in run.memories.items()
    }
    tables = {table.name: table.shard.values.numpy().copy() for table in session.model.tables}
    tear_down(session.world)
    return slots, tables


def inspected(path: Path, texts: tuple[Asked, ...], settings: dict[str, Any]) -> str:
    """On a rank: what the command says, or why not."""
    said: list[str] = []
    try:
        command.inspect(Request(**{"checkpoint": path, "texts": texts, "as_json": True, **settings}), said.append)
    except MemparError as error:
        return f"{type(error).__name__} {error.exit_status}: {error}"
    return "\n".join(said)


def choices(path: Path, windows: list[list[int]]) -> list[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """On a rank: slots and weights `[T, H, K]` of each block for each window, from the scores of all slots."""
    found: list[dict[int, tuple[np.ndarray, np.ndarray]]] = []

    def watch(layer: MemoryMLP, query: torch.Tensor) -> None:
        config = layer.config
        halves = query.view(-1, config.heads, 2, config.half_key_dim)
        first, second = (torch.einsum("thq,hnq->thn", halves[:, :, half], layer.keys[:, half]) for half in (0, 1))
        scores, slots = (first[..., :, None] + second[..., None, :]).flatten(2).topk(config.top_k)
        found[-1][layer.block] = slots.numpy(), scores.double().softmax(-1).numpy()

    with open_model(path, tables="memory") as opened, torch.no_grad():
        for module in opened.model.chunks[0].modules():
            if isinstance(module, MemoryMLP):
                module.query.register_forward_hook(lambda _, __, query, layer=module: watch(layer, query))
        for window in windows:
            found.append({})
            opened.forward.logits(torch.tensor([window]))
    return found


def save_initial(run: RunConfig, path: Path) -> None:
    session = Session(run)
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, run, session, {"step": 0, "applied_steps": 0})
    tear_down(session.world)


def write_data(prefix: Path, documents: list[list[int]]) -> Asked:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return Asked(kind="data", source=str(prefix))
