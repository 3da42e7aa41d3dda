"""The estimate itself: bytes by kind of every pipeline stage, and the stage that decides."""

from dataclasses import dataclass, fields

from mempar.runtime.config import RunConfig
from mempar.runtime.estimate.activations import (
    blocks_of,
    buffer_bytes,
    chunk_bytes,
    logits_bytes,
)
from mempar.runtime.estimate.dense import dense_bytes
from mempar.runtime.estimate.layout import Layout
from mempar.runtime.estimate.passes import largest_kept
from mempar.runtime.estimate.reserved import reserved_bytes
from mempar.runtime.estimate.tables import table_bytes
from mempar.runtime.hardware import Gpu


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Bytes of one rank of a pipeline stage, the one that holds most.

    The last seven do not all exist at once; `total` says which do.

    Attributes:
        weights: dense parameters, in buffers with gaps under the distributed optimizer.
        gradients: the dense parameters', in buffers.
        optimizer_state: of the dense parameters.
        table_values: of the shards of the tables.
        table_state: of their optimizers, and when each row was read last.
        reserved: contexts and communicators of a GPU; an assumption.
        records: gradients of table rows as deposited, at the end of the backward passes.
        row_sums: beside the records, when they are summed by row, over copies, and applied.
        activations: kept by the micro-batches in flight for their backward passes.
        logits: with the softmax and their gradients, of one micro-batch.
        recomputed: of one block, with the gradients of its activations.
        buffers: messages of layers and of the pipeline, scores of half keys, gathered sequences, the batch.
        early_sums: what bounds the records while backward passes last (memory.deposit_bytes).
    """

    weights: int
    gradients: int
    optimizer_state: int
    table_values: int
    table_state: int
    reserved: int
    records: int
    row_sums: int
    activations: int
    logits: int
    recomputed: int
    buffers: int
    early_sums: int

    @property
    def held(self) -> int:
        """Bytes held between steps."""
        state = self.weights + self.gradients + self.optimizer_state
        return state + self.table_values + self.table_state + self.reserved

    @property
    def in_passes(self) -> int:
        """Most bytes beside those during forward and backward passes, records included.

        Logits are gone when the blocks are differentiated.
        """
        return self.records + self.early_sums + self.activations + max(self.logits, self.recomputed) + self.buffers

    @property
    def in_update(self) -> int:
        """Most bytes beside those after the last backward pass, records included."""
        return self.records + self.row_sums

    @property
    def total(self) -> int:
        """Most bytes at any time."""
        return self.held + max(self.in_passes, self.in_update)

    def by_kind(self) -> dict[str, int]:
        """Bytes by the attributes' names."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a run on a number of ranks.

    Attributes:
        run: the run, with what its layout decides filled in.
        num_ranks: ranks that it is laid out on.
        stages: bytes of a rank of each pipeline stage.
    """

    run: RunConfig
    num_ranks: int
    stages: tuple[StageBytes, ...]

    @property
    def worst_stage(self) -> int:
        """The pipeline stage that needs most."""
        totals = [stage.total for stage in self.stages]
        return totals.index(max(totals))

    @property
    def worst(self) -> StageBytes:
        """Its bytes."""
        return self.stages[self.worst_stage]

    def fits(self, gpu: Gpu) -> bool:
        """Whether every stage fits a GPU of that kind."""
        return self.worst.total <= gpu.memory_bytes


def estimate(run: RunConfig, num_ranks: int, vocab: int | None = None) -> Estimate:
    """Estimate the memory of a run's ranks, without starting any.

    Args:
        run: the run.
        num_ranks: ranks that it is started on.
        vocab: tokens of the tokenizer; by default `model.vocab_size`, or the tokenizer is asked.

    Raises:
        ConfigError: when the run does not fit that number of ranks.
    """
    return estimate_layout(Layout.of(run, num_ranks, vocab), num_ranks)


def estimate_layout(layout: Layout, num_ranks: int) -> Estimate:
    """Estimate the memory of a run that is laid out on so many ranks."""
    stages = tuple(stage_bytes(layout, stage) for stage in range(layout.grid.pp))
    return Estimate(run=layout.run, num_ranks=num_ranks, stages=stages)


def stage_bytes(layout: Layout, stage: int) -> StageBytes:
    """Bytes of the rank of a stage that holds most."""
    chunks = layout.chunks_of(stage)
    dense, tables = dense_bytes(layout, stage), table_bytes(layout, stage)
    return StageBytes(
        weights=dense.weights,
        gradients=dense.gradients,
        optimizer_state=dense.state,
        table_values=tables.values,
        table_state=tables.state,
        reserved=reserved_bytes(layout, stage),
        records=tables.records,
        row_sums=tables.row_sums,
        activations=largest_kept(layout, stage, [chunk_bytes(layout, chunk) for chunk in chunks]),
        logits=logits_bytes(layout) if any(chunk.is_last for chunk in chunks) else 0,
        recomputed=max(block.again + block.gradients for block in blocks_of(layout, stage)),
        buffers=buffer_bytes(layout, stage),
        early_sums=tables.early_sums,
    )
