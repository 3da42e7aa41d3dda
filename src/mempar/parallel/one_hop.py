"""Sums and output gradients in one hop: every member of the group sends to every other (F2, B1)."""

from torch import Tensor

from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.segment_route import pack_columns, unpack_columns
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.shard_plan import ShardPlan


class OneHop:
    """Moves a table's sums and gradients in one all-to-all over the memory-parallel group."""

    def __init__(self, plan: ShardPlan, group: MemberGroup, *, backend: Backend = TORCH) -> None:
        """Join the group.

        Args:
            plan: how the table is cut.
            group: the memory-parallel group.
            backend: what packs and adds.
        """
        self.group = group
        self.backend = backend
        self.rows = plan.num_row_shards
        self.column_cuts = plan.column_cuts
        spans = [plan.columns_of(member) for member in range(plan.num_shards)]
        self.widths = [end - start for start, end in spans]

    def return_values(self, partial: Tensor, token_counts: list[int]) -> Tensor:
        """Phase F2: send each rank the sums of its tokens; add row shards, join column shards.

        Args:
            partial: `[T_sum, D_j]`, this shard's sums for all members' tokens.
            token_counts: tokens of each member.

        Returns:
            `[T, D]`. Sends `b D_j (T_sum - T)` bytes.
        """
        width, num_tokens = self.widths[self.group.rank], token_counts[self.group.rank]
        receive_sizes = [num_tokens * columns for columns in self.widths]
        send_sizes = [count * width for count in token_counts]
        received = self.group.all_to_all(partial.reshape(-1), send_sizes, receive_sizes, "values")
        # Members stand column shard by column shard, and in it row shards are added lowest first, whatever this rank's
        # own shard is.
        return unpack_columns(received, self.column_cuts, num_tokens, self.rows, backend=self.backend)

    def send_output_grads(self, grad: Tensor, token_counts: list[int]) -> Tensor:
        """Phase B1: give every owner its columns of this rank's output gradient.

        Args:
            grad: `[T, D]`.
            token_counts: tokens of each member.

        Returns:
            `[T_sum, D_j]`, the gradients of all members' tokens for this shard's columns. Sends
            `b T (R D - D_j)` bytes.
        """
        width = self.widths[self.group.rank]
        send = pack_columns(grad, self.column_cuts, self.rows, backend=self.backend)
        send_sizes = [len(grad) * columns for columns in self.widths]
        received = self.group.all_to_all(send, send_sizes, [count * width for count in token_counts], "output_grads")
        return received.view(sum(token_counts), width)
