"""Memory layers where megatron expects a feed-forward network: in its place, or beside it."""

from typing import Any

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
        super().__init__(memory, run.model.hidden_size, run.model.norm_epsilon)
        self.to(config.params_dtype)
        self.access = access
        self.balance = access.balance
        self.block = -1
        for param in self.parameters():
            # Dense parts see a share of the sequence: megatron sums these gradients over tensor ranks.
            param.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the 1-based global number of the block; megatron calls this."""
        self.block = layer_number - 1

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Look up.

        Args:
            hidden_states: `[s, b, C]`, RMS-normed; a share of the sequence under sequence parallelism.
            padding_mask: megatron's, unused.

        Returns:
            `[s, b, C]` and no bias.
        """
        length, batch, width = hidden_states.shape
        hook = None
        if self.access.hook_factory is not None:
            hook = self.access.hook_factory(self.block, length, batch)
        # Every member of the memory-parallel group runs the same schedule, so it holds as many tokens.
        counts = [length * batch] * self.access.num_members
        out = super().forward(hidden_states.reshape(-1, width), self.access.readers, hook, counts)
        return out.view(length, batch, width), None


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
