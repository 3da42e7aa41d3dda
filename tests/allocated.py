"""What a built run really holds, by kind, for comparison with the estimate.

`held_bytes` sums storages of the engine's own objects: parameters, DDP's buffers, what megatron's optimizers keep, the
tables and their state. `Kept` sums what a forward pass leaves behind for the backward pass: tensors that autograd
saves, and those that our functions keep beside them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from toy import Session


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of the storages of some tensors, each once, by where they lie."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def held_bytes(session: Session) -> dict[str, int]:
    """Bytes that a rank holds between steps, after one step at least."""
    model, optimizers = session.model, session.optimizers
    weights = storages(param for chunk in model.chunks for param in chunk.parameters())
    buffers = [buffer for ddp in model.wrapped for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    gradients = storages(buffer.grad_data for buffer in buffers)
    # Numbers of steps are scalars on the host.
    kept = [
        tensor
        for member in optimizers.members
        if member.optimizer is not None
        for param, state in member.optimizer.state.items()
        for tensor in (param, *state.values())
        if torch.is_tensor(tensor) and tensor.dim() > 0
    ]
    state = {place: size for place, size in storages(kept).items() if place not in weights}
    # Gradients of main parameters are views of the buffers.
    mains = [group["params"] for member in optimizers.members for group in member.param_groups]
    main_grads = storages(param.grad for params in mains for param in params if param.grad is not None)
    assert main_grads.keys() <= gradients.keys()
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer_state": sum(state.values()),
        "table_values": sum(storages(table.shard.values for table in model.tables).values()),
        "table_state": sum(sum(storages(each.state.values()).values()) for each in optimizers.tables.values())
        + sum(storages(history.last_read for history in optimizers.histories.values()).values()),
    }


class Kept:
    """Bytes kept for the backward pass, by storage."""

    def __init__(self, ignored: dict[int, int]) -> None:
        self.ignored = ignored
        self.found: dict[int, int] = {}
        self.log: list[tuple[str, tuple[int, ...], str, int]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what autograd saves."""

        def pack(tensor: Tensor) -> Tensor:
            self.note(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def note(self, value: Any) -> None:
        """Note a tensor, or those in a dataclass or list."""
        if torch.is_tensor(value):
            new = {place: size for place, size in storages([value]).items() if place not in self.ignored}
            for place, size in new.items():
                if place not in self.found:
                    self.log.append((str(value.dtype), tuple(value.shape), hex(place), size))
            self.found |= new
        elif is_dataclass(value) and not isinstance(value, type):
            for each in fields(value):
                self.note(getattr(value, each.name))

    def follow(self, output: Tensor) -> None:
        """Note what our functions keep beside what autograd saves, in all that led to an output."""
        waiting, seen = [output.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for name in ("found", "request"):
                self.note(getattr(node, name, None))
            waiting += [next_node for next_node, _ in node.next_functions]

    @property
    def total(self) -> int:
        return sum(self.found.values())
