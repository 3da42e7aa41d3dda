"""What the estimate asks of a run's layout: which rank holds which blocks, and how large its parts are; integers only.

Everything is of one rank; ranks of a stage differ in their shards of tables and of the distributed optimizer's state,
and by a row, a column tile or an alignment at most.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.parallel.ranks import RankGrid
from mempar.runtime.config import RunConfig
from mempar.runtime.data.batch_plan import BatchPlan, plan_batch
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.placement import Placement, place, resolve

DTYPE_BYTES = {"float64": 8, "float32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive blocks that a rank computes together: a virtual stage, or all of a stage.

    Attributes:
        blocks: 0-based numbers of its blocks.
        is_first: whether it begins with the embedding.
        is_last: whether it ends with the output projection and the loss.
    """

    blocks: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Layout:
    """A resolved run on a number of ranks.

    Attributes:
        run: the run, with virtual stages and micro-batch size filled in.
        placement: of its tables.
        vocab: tokens of the tokenizer, before padding.
    """

    run: RunConfig
    placement: Placement
    vocab: int

    @classmethod
    def of(cls, run: RunConfig, num_ranks: int, vocab: int | None = None) -> "Layout":
        """Lay a run out.

        Args:
            run: the run.
            num_ranks: ranks that it is started on.
            vocab: tokens of the tokenizer; by default it is asked for, unless model.vocab_size says.

        Raises:
            ConfigError: when the sizes do not fit the number of ranks or the tables.
        """
        if num_ranks < 1:
            raise ConfigError(f"an estimate for {num_ranks} ranks: a run needs at least one; raise the number.")
        run = resolve(run, num_ranks)
        tokens = vocab or run.model.vocab_size or vocab_size(run)
        return cls(run=run, placement=place(run, num_ranks), vocab=tokens)

    @property
    def grid(self) -> RankGrid:
        """Ranks of every dimension."""
        return self.placement.grid

    @property
    def value_bytes(self) -> int:
        """Bytes of a parameter and of an activation."""
        return DTYPE_BYTES[self.run.train.dtype]

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number that is computed in float32 at least."""
        return max(4, self.value_bytes)

    @property
    def on_gpu(self) -> bool:
        """Whether the run is meant for GPUs, whose engine has TransformerEngine's blocks."""
        return self.run.hardware.kind is not None

    @property
    def is_fused(self) -> bool:
        """Whether Triton's kernels compute what memory layers need."""
        backend = self.run.kernels.backend
        return backend == "triton" or (backend == "auto" and self.on_gpu)

    @cached_property
    def batch(self) -> BatchPlan:
        """The cut of a global batch."""
        return plan_batch(self.run, self.grid.dp)

    @property
    def num_in_tensor(self) -> int:
        """Ranks that share a sequence's activations outside of attention and feed-forward networks."""
        return self.grid.tp if self.run.parallel.sequence_parallel else 1

    @property
    def positions(self) -> int:
        """Positions of a sequence on a rank where tensor-parallel ranks hold all: `s / cp`."""
        return self.run.train.seq_length // self.grid.cp

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank where tensor-parallel ranks hold all: `b s / cp`."""
        return self.run.train.micro_batch_size * self.positions

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch that a rank holds between blocks: a share of them under sequence parallelism."""
        return self.tokens // self.num_in_tensor

    def chunks_of(self, stage: int) -> list[Chunk]:
        """The virtual stages of a pipeline stage, in the order of their blocks."""
        sizes, num_layers = self.run.parallel, self.run.model.num_layers
        length = num_layers // (sizes.pp * sizes.vpp)
        starts = [(place * sizes.pp + stage) * length for place in range(sizes.vpp)]
        return [
            Chunk(
                blocks=range(start, start + length),
                is_first=start == 0,
                is_last=start + length == num_layers,
            )
            for start in starts
        ]

    @cached_property
    def by_kind(self) -> dict[tuple[str, int], Any]:
        """What is known of one block of each kind, by what it is and the block: written and read by who computes it."""
        return {}

    @cached_property
    def like(self) -> dict[int, int]:
        """For each block the first one of its kind, whose sizes are the same."""
        run, first = self.run, {}
        names = {block: name for name, memory in run.memories.items() for block in memory.layers}
        names |= dict.fromkeys(run.moe_layers, "moe")
        return {block: first.setdefault(names.get(block, ""), block) for block in range(run.model.num_layers)}

    def memory_of(self, block: int) -> MemoryConfig | None:
        """The memory whose layer a block has."""
        return next((memory for memory in self.run.memories.values() if block in memory.layers), None)
