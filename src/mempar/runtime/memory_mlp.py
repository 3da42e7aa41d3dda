"""Memory layers where megatron expects a feed-forward network: in its place, or beside it."""

from typing import Any

import torch
from torch import Tensor

from mempar.memory.config import MemoryConfig
from mempar.memory.layer import MemoryLayer
from mempar.runtime import mcore
from mempar.runtime.config import RunConfig
from mempar.runtime.tables import TableAccess


class MemoryMLP(MemoryLayer):
    """A memory layer with the signature of megatron's MLP."""

    def __init__(self, config: Any, run: RunConfig, memory: MemoryConfig, access: TableAccess, **kwargs: Any) -> None:
        """Take megatron's configuration, and ours through the block's description."""
        super().__init__(memory, run.model.hidden_size, run.model.norm_epsilon, access.backend)
        self.to(config.params_dtype)
        self.access = access
        self.balance = access.balance
        self.marks = access.marks
        self.block = -1
        for param in self.parameters():
            # Dense parts see a share of the sequence: megatron sums these gradients over tensor ranks.
            param.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the 1-based global number of the block; megatron calls this."""
        self.block = layer_number - 1

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the parameters, which every tensor-parallel rank holds whole; an MLP asks its parts for this."""
        tensor_group: Any = mcore.parallel_state.get_tensor_model_parallel_group()
        return mcore.make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=tensor_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

    def choose(self, x: Tensor, slot_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose as every memory layer does, and let the choice be counted in a step that is watched."""
        slot_index, weight = super().choose(x, slot_index)
        tally = self.access.tally
        # A layer that is recomputed runs first without gradients, and then once with them.
        if tally is not None and (torch.is_grad_enabled() or tally.without_gradients):
            tally.add(self.block, slot_index, weight)
        return slot_index, weight

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Look up the samples of the micro-batch; its padding reads nothing and gets zeros.

        Args:
            hidden_states: `[s, b, C]`, RMS-normed; a share of the sequence under sequence parallelism.
            padding_mask: megatron's, unused.

        Returns:
            `[s, b, C]` and no bias.
        """
        length, batch_size, width = hidden_states.shape
        access = self.access
        current = access.in_flight.enter(self.block, training=self.training)
        num_samples = len(current.batch.sample_ids)
        # Members run one schedule, so each of them is at its own part of the same round of micro-batches.
        counts = [length * current.batch.sample_counts[dp_rank] for dp_rank in access.member_dp_ranks]
        hook = access.hook_factory(self.block, length, current) if access.hook_factory is not None else None
        tokens = hidden_states[:, :num_samples].reshape(-1, width)
        access.marks.enter(self.block, again=current.again)
        out = super().forward(tokens, access.readers, hook, counts).view(length, num_samples, width)
        access.marks.leave()
        if num_samples < batch_size:
            out = torch.cat([out, out.new_zeros(length, batch_size - num_samples, width)], dim=1)
        return out, None


class MLPWithMemory(mcore.MLP):
    """Megatron's feed-forward network with a memory layer beside it: the outputs are added."""

    def __init__(
        self, config: Any, submodules: Any, run: RunConfig, memory: MemoryConfig, access: TableAccess, **kwargs: Any
    ) -> None:
        """Take megatron's arguments, and ours through the block's description."""
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, **kwargs)
        self.memory = MemoryMLP(config, run, memory, access)

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the 1-based global number of the block; megatron calls this."""
        self.memory.set_layer_number(layer_number)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the sum of both, `[s, b, C]`, and the network's bias (none)."""
        out, bias = super().forward(hidden_states, *args, **kwargs)
        return out + self.memory(hidden_states)[0], bias
