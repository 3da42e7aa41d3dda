"""Contests of whole lookups: a memory layer's forward, backward and update, as the engine calls them."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mempar.dims import TableSlice
from mempar.kernels.contest import Contest, Shape
from mempar.kernels.dispatch import TORCH, Backend
from mempar.memory.config import MemoryConfig
from mempar.memory.layer import MemoryLayer, initial_value
from mempar.memory.lookup import LocalReader, Readers
from mempar.memory.optimizer import OptimizerSettings, make_table_optimizer
from mempar.memory.values import ValueShard

# Lookups of one step in the default form: layers that share a table, times micro-batches.
SHARED_LAYERS, MICRO_BATCHES = 3, 4
SLOT_COUNTS = (1024, 2048, 4096, 8192)


class _Folded:
    """Reads a table of fewer rows than the layer has slots: what fits on one device, at the cost of all of them."""

    def __init__(self, shard: ValueShard) -> None:
        self.inner, self.num_rows = LocalReader(shard), shard.part.num_rows

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Any:
        return self.inner.find(slot_index % self.num_rows, token_counts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Lookup:
    """Memory+ with a table beside it that row-wise Adagrad updates."""

    def __init__(self, shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> None:
        num_rows = shape.rows_within(table_bytes)
        config = MemoryConfig(
            layers=(0,),
            num_subkeys=shape.subkeys,
            heads=shape.heads,
            top_k=shape.top_k,
            key_dim=2 * shape.half_key,
            optimizer="row_adagrad",
        )
        part = TableSlice(
            num_slots=num_rows,
            value_dim=shape.width,
            row_start=0,
            row_end=num_rows,
            column_start=0,
            column_end=shape.width,
        )
        self.shard = ValueShard(part, seed=1, dtype=shape.dtype, device=device, backend=backend)
        settings = OptimizerSettings(
            beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, rounding="stochastic", backend=backend
        )
        self.optimizer = make_table_optimizer("row_adagrad", self.shard.values, part, settings)
        self.layer = MemoryLayer(config, shape.width, 1e-5, backend)
        generator = torch.Generator().manual_seed(1)
        for name, param in self.layer.named_parameters():
            drawn = initial_value(name, tuple(param.shape), generator)
            assert drawn is not None
            param.data.copy_(drawn)
        self.layer.to(device=device, dtype=shape.dtype)
        self.readers = Readers(values=_Folded(self.shard))
        self.x = torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype).requires_grad_()
        self.grad = torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype)

    def forward(self) -> Tensor:
        """Outputs, to be differentiated."""
        return self.layer(self.x, self.readers)

    def backward(self, out: Tensor) -> None:
        """Deposit the rows' gradients."""
        out.backward(self.grad)

    def update(self) -> None:
        """Reduce what was deposited, and apply it."""
        rows, grad = self.shard.take_gradient()
        self.optimizer.update(rows, grad, 1e-3)

    def step(self, lookups: int = 1) -> None:
        """A training step with so many lookups."""
        for _ in range(lookups):
            self.backward(self.forward())
        self.update()


def layer_contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield a lookup beside embedding_bag, the whole layer beside torch's operators, and time against slots."""
    if device.type == "cpu":
        yield from lookups_against_embedding_bag(shape, backend, device)
    lookup = Lookup(shape, backend, device, table_bytes // 2)
    plain = Lookup(shape, TORCH, device, table_bytes // 4) if backend.is_triton else None
    yield Contest(
        name="layer, forward",
        ours=torch.no_grad()(lookup.forward),
        rivals={} if plain is None else {"torch": torch.no_grad()(plain.forward)},
        num_bytes=_gather_bytes(shape),
        num_flops=_forward_flops(shape),
    )
    yield Contest(
        name="layer, forward + backward + update",
        ours=lookup.step,
        rivals={} if plain is None else {"torch": plain.step},
        # The rows once forward and once for the weights' gradient, and those that were touched read and written.
        num_bytes=2 * _gather_bytes(shape) + 2 * _touched_rows(shape, lookup) * shape.width * shape.value_bytes,
        num_flops=3 * _forward_flops(shape),
    )
    lookups = SHARED_LAYERS * MICRO_BATCHES
    # Nearly all rows are touched, and the float32 sums of bf16 rows take twice the table's room.
    lookup = Lookup(shape, backend, device, table_bytes // 4)
    yield Contest(
        name=f"step of {SHARED_LAYERS} layers x {MICRO_BATCHES} micro-batches",
        ours=lambda: lookup.step(lookups),
        num_bytes=lookups * 2 * _gather_bytes(shape)
        + 2 * _touched_rows(shape, lookup, lookups) * shape.width * shape.value_bytes,
        num_flops=lookups * 3 * _forward_flops(shape),
    )


def slot_contests(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield the same step with more and more slots."""
    for subkeys in SLOT_COUNTS:
        wider = replace(shape, subkeys=subkeys)
        if wider.rows_within(table_bytes) < subkeys**2:
            break
        lookup = Lookup(wider, backend, device, table_bytes)
        yield Contest(
            name=f"layer with {subkeys**2 / 2**20:.0f}M slots",
            ours=lookup.step,
            num_bytes=2 * _gather_bytes(wider) + 2 * _touched_rows(wider, lookup) * wider.width * wider.value_bytes,
            num_flops=3 * _forward_flops(wider),
        )


def large_table_contest(shape: Shape, backend: Backend, device: torch.device, table_bytes: int) -> Iterator[Contest]:
    """Yield a step of 34B parameters, 16M rows of 2048 bf16 numbers, where the device holds them."""
    if shape.name != "1.3b" or device.type != "cuda":
        return
    shape = replace(shape, name="34b", tokens=4096, subkeys=4096)
    table_bytes = shape.subkeys**2 * shape.width * shape.value_bytes
    if torch.cuda.get_device_properties(device).total_memory < 1.15 * table_bytes:
        return
    # It takes nearly all that an 80 GB device has.
    torch.cuda.empty_cache()
    lookup = Lookup(shape, backend, device, table_bytes)
    yield Contest(
        name="step with 34B parameters",
        ours=lookup.step,
        num_bytes=2 * _gather_bytes(shape) + 2 * _touched_rows(shape, lookup) * shape.width * shape.value_bytes,
        num_flops=3 * _forward_flops(shape),
    )


def lookups_against_embedding_bag(shape: Shape, backend: Backend, device: torch.device) -> Iterator[Contest]:
    """Yield a read with all its gradients beside F.embedding_bag with a sparse gradient.

    First as autograd leaves the rows' gradients: as records here, as a row and numbers for each entry there. Then
    summed by row, as an optimizer needs them.
    """
    num_rows, entries = shape.subkeys**2, shape.tokens * shape.reads
    shard = Lookup(shape, backend, device, num_rows * shape.width * shape.value_bytes).shard
    reader, table = LocalReader(shard), shard.values.clone().requires_grad_()
    slots = torch.randint(num_rows, (shape.tokens, shape.reads), device=device)
    weight = torch.rand(shape.tokens, shape.reads, device=device).to(shape.dtype).requires_grad_()
    grad = torch.randn(shape.tokens, shape.width, device=device).to(shape.dtype)

    def ours() -> list[Tensor]:
        weight.grad = None
        out = reader.read(reader.find(slots), weight)
        out.backward(grad)
        return [out, _grad(weight)]

    def deposited() -> list[Tensor]:
        found = ours()
        # Dropped, as a step that is skipped drops them: without being summed.
        shard._records.clear()
        return found

    def reduced() -> list[Tensor]:
        return [*ours(), *shard.take_gradient()]

    def theirs() -> list[Tensor]:
        weight.grad = table.grad = None
        out = F.embedding_bag(slots, table, mode="sum", per_sample_weights=weight, sparse=True)
        out.backward(grad)
        return [out, _grad(weight)]

    def coalesced() -> list[Tensor]:
        found, gradient = theirs(), _grad(table).coalesce()
        return [*found, gradient.indices()[0].int(), gradient.values()]

    for name, run, rival, tables in (
        ("lookup, forward + backward", deposited, theirs, 2),
        ("lookup, forward + backward, rows summed", reduced, coalesced, 3),
    ):
        yield Contest(
            name=name,
            ours=run,
            truth=rival,
            rivals={"embedding_bag, sparse": rival},
            num_bytes=tables * entries * shape.width * shape.value_bytes,
            tolerance=torch.finfo(shape.dtype).eps * math.sqrt(shape.reads),
        )


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _gather_bytes(shape: Shape) -> int:
    return shape.tokens * shape.reads * shape.width * shape.value_bytes


def _forward_flops(shape: Shape) -> int:
    projections = shape.width * 2 * shape.heads * shape.half_key + 2 * shape.width**2
    scores = 2 * shape.heads * shape.subkeys * shape.half_key
    return 2 * shape.tokens * (projections + scores)


def _touched_rows(shape: Shape, lookup: Lookup, lookups: int = 1) -> int:
    """Rows that so many reads touch when all rows are as likely."""
    num_rows = lookup.shard.part.num_rows
    return round(num_rows * -math.expm1(-lookups * shape.tokens * shape.reads / num_rows))
