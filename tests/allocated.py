"""What a built run really holds and keeps, by kind, for comparison with the estimate.

`held_bytes` sums storages of the engine's own objects: parameters, DDP's buffers, what megatron's optimizers keep, the
tables and their state. `Kept` sums what a forward pass leaves behind for the backward pass: tensors that autograd
saves, and those that our functions keep beside them. `peak_of_step` asks the allocator.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mempar.parallel import collectives
from mempar.runtime.bringup import tear_down
from mempar.runtime.config import RunConfig
from mempar.runtime.slot_trace import SlotTrace
from test_memory_footprint import all_to_all_and_let_go
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


@dataclass(kw_only=True)
class Kept:
    """Bytes kept for the backward pass, by storage; those that are held anyway are ignored."""

    ignored: dict[int, int]
    found: dict[int, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what autograd saves."""

        def pack(tensor: Tensor) -> Tensor:
            self.note(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def note(self, value: Any) -> None:
        """Note a tensor, or those in a dataclass."""
        if torch.is_tensor(value):
            self.found |= {place: size for place, size in storages([value]).items() if place not in self.ignored}
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


@dataclass(kw_only=True)
class Allocated:
    """What a rank allocated.

    Attributes:
        held: bytes between steps by kind.
        kept: (chunk, bytes) for each forward pass of a step; what the loss keeps is among them.
        records: bytes deposited in all shards when a step's backward passes are through.
        most_records: most bytes that were deposited in a shard at a time.
    """

    held: dict[str, int]
    kept: list[tuple[int, int]] = field(default_factory=list)
    records: int = 0
    most_records: int = 0


def allocated(run: RunConfig) -> Allocated:
    """Train two steps on this rank and look at the second; every rank of the pool's job calls it."""
    session = Session(run)
    session.model.hook_slots(None)
    # RoPE's angles and moments are made in the first step.
    session.step(0)
    seen = Allocated(held=held_bytes(session))
    tensors = [param for chunk in session.model.chunks for param in chunk.parameters()]
    ignored = storages([*tensors, *(table.shard.values for table in session.model.tables)])
    forward = session.stepper._forward

    def watched(batches: Any, chunk: Any) -> Any:
        kept = Kept(ignored=dict(ignored))
        with kept.watching():
            output, loss = forward(batches, chunk)
        kept.follow(output)
        if output.dim() == 3:
            # The schedule holds what it sends to the next stage.
            kept.note(output)
        batch = session.model.in_flight.current
        for place in storages([batch.tokens, batch.labels, batch.loss_mask, batch.position_ids]):
            kept.found.pop(place, None)
        seen.kept.append((session.model.wrapped.index(chunk), kept.total))
        return output, loss

    session.stepper._forward = watched  # type: ignore[method-assign]
    for table in session.model.tables:
        watch_records(table.shard, seen)
    session.step(1)
    tear_down(session.world)
    return seen


def watch_records(shard: Any, seen: Allocated) -> None:
    take, deposit = shard.take_gradient, shard.deposit

    def taking() -> Any:
        if not shard.summing:
            seen.records += shard.record_bytes
        return take()

    def depositing(*args: Any) -> None:
        shard.summing = True
        deposit(*args)
        shard.summing = False
        seen.most_records = max(seen.most_records, shard.record_bytes)

    shard.summing, shard.take_gradient, shard.deposit = False, taking, depositing


def peak_of_step(run: RunConfig, replay: SlotTrace | None = None) -> int:
    """Train two steps on this rank; the most bytes that the allocator had given out at once in the second."""
    instead = SimpleNamespace(**{**vars(dist), "all_to_all_single": all_to_all_and_let_go})
    with (
        patch.object(collectives, "dist", instead),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
    ):
        session = Session(run, replay)
        session.model.hook_slots(session.tracer if replay else None)
        session.step(0)
        with record_function("the step"):
            session.step(1)
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    started = next(event.start_ns() for event in events if event.name() == "the step")
    held = peak = 0
    for event in events:
        held += event.nbytes() if event.name() == "[memory]" else 0
        if event.start_ns() > started:
            peak = max(peak, held)
    tear_down(session.world)
    return peak
