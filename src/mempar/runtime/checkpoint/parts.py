"""What one rank writes of a checkpoint: its parts of tensors and what goes with them."""

from dataclasses import dataclass

from torch import Tensor

from mempar.runtime.bringup import World
from mempar.runtime.checkpoint import torch_dist
from mempar.runtime.checkpoint.boxes import Box
from mempar.runtime.checkpoint.dense import dense_parts
from mempar.runtime.checkpoint.holdings import block_rows, saved_share
from mempar.runtime.checkpoint.names import is_optimizer_state
from mempar.runtime.checkpoint.tables import table_parts
from mempar.runtime.config import RunConfig
from mempar.runtime.model import Model
from mempar.runtime.optim import Optimizers

# Headers, small files and what a file system keeps for itself, in bytes a part.
_SPARE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that one rank writes.

    Attributes:
        dense: parts of parameters and of their optimizers' state.
        objects: other things of megatron's, serialised, by its keys.
        common: what all ranks have in common, serialised; empty but on the main rank.
        shards: kind, place, numbers and rows of a block, of what belongs to tables.
    """

    dense: list[tuple[Box, Tensor]]
    objects: dict[str, bytes]
    common: bytes
    shards: list[tuple[str, Box, Tensor, int]]

    @property
    def boxes(self) -> list[Box]:
        """All parts of tensors."""
        return [box for box, _ in self.dense] + [box for _, box, _, _ in self.shards]

    @property
    def num_bytes(self) -> int:
        """About what they take on disk."""
        tensors = [tensor for _, tensor in self.dense] + [tensor for _, _, tensor, _ in self.shards]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors] + [*map(len, self.objects.values())]
        return sum(sizes) + _SPARE_BYTES * len(sizes)

    def copied(self, run: RunConfig) -> "Parts":
        """The same in host memory of its own, which training does not change."""
        gathered = run.parallel.distributed_optimizer
        return Parts(
            # The distributed optimizer's state has been put together for the checkpoint alone.
            dense=[
                (box, tensor if gathered and is_optimizer_state(box.name) else _copy(tensor))
                for box, tensor in self.dense
            ],
            objects=self.objects,
            common=self.common,
            shards=[(kind, box, _copy(tensor), rows) for kind, box, tensor, rows in self.shards],
        )


def collect_parts(run: RunConfig, world: World, model: Model, optimizers: Optimizers) -> Parts:
    """Find what this rank writes; every rank must call it. Tensors are the model's own."""
    dense, objects, common = dense_parts(model, optimizers)
    shards = []
    for table, kind, box, tensor in table_parts(model.tables, optimizers, list(optimizers.histories)):
        part, copies = table.shard.part, table.copies
        rows = block_rows(part.value_dim, table.shard.values.element_size(), run.checkpoint.block_bytes)
        if (share := saved_share(kind, part, box, copies.rank, copies.size, rows)) is not None:
            mine, _ = box.overlap(share) or ((), ())
            shards.append((kind, share, tensor[mine], rows))
    # Serialised at once: it holds numbers that the next step changes.
    told = bytes(torch_dist.saved(common)) if world.is_main else b""
    return Parts(dense=dense, objects=objects, common=told, shards=shards)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
