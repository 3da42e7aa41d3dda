"""Sums and output gradients of a grid in two hops: within a column shard, then across (F2, B1).

Member m holds row shard i = m % R and column shard j = m // R. The R ranks of one column shard are
neighbours, inside a node where it has R ranks; the W ranks of one row coordinate lie on W nodes. Going
forward, sums are reduced over row shards before they leave the node; going backward, a gradient's slice
enters the node once and is shared there. Row shards are added in the same order as in one hop, so the
results are bit for bit the same.
"""

import itertools

import torch
from torch import Tensor

from mempar.kernels.dispatch import TORCH, Backend
from mempar.kernels.segment_route import pack_columns, unpack_columns
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.shard_plan import ShardPlan


class TwoHops:
    """Moves a grid's sums and gradients over two smaller groups."""

    def __init__(self, plan: ShardPlan, inside: MemberGroup, across: MemberGroup, *, backend: Backend = TORCH) -> None:
        """Join the two groups.

        Args:
            plan: how the table is cut.
            inside: the R ranks that hold this rank's column shard, row shards ascending.
            across: the W ranks that hold this rank's row shard, column shards ascending.
            backend: what packs and adds.
        """
        shards = (plan.num_row_shards, plan.num_column_shards)
        if (inside.size, across.size) != shards:
            raise ValueError(f"{shards} row and column shards need such groups, got {inside.size} and {across.size}.")
        self.inside, self.across = inside, across
        self.backend = backend
        self.column_cuts = plan.column_cuts
        self.widths = [end - start for start, end in itertools.pairwise(self.column_cuts)]
        self.rows, self.columns = shards

    def _tokens_by_row(self, token_counts: list[int]) -> list[list[int]]:
        """Token counts of the members (i, *), for every row coordinate i."""
        return [token_counts[row :: self.rows] for row in range(self.rows)]

    def return_values(self, partial: Tensor, token_counts: list[int]) -> Tensor:
        """Phase F2: reduce each token's sums over row shards inside, then send them across.

        Args:
            partial: `[T_sum, D_j]`, this shard's sums for all members' tokens.
            token_counts: tokens of each member.

        Returns:
            `[T, D]`. With Tcol the tokens of the members (i, *), `b D_j (T_sum - Tcol)` bytes are sent
            inside and `b D_j (Tcol - T)` across.
        """
        by_row = self._tokens_by_row(token_counts)
        mine = by_row[self.inside.rank]
        num_tokens, width = mine[self.across.rank], self.widths[self.across.rank]
        # From member order (rows fastest) to row coordinates, each with its columns in order.
        pieces = partial.split(token_counts)
        send = torch.cat([piece for row in range(self.rows) for piece in pieces[row :: self.rows]])
        send_sizes = [sum(counts) for counts in by_row]
        received = self.inside.all_to_all(send, send_sizes, [sum(mine)] * self.rows, "values_inside")
        # Lowest row shard first, as in one hop.
        total = unpack_columns(received.view(-1), [0, width], sum(mine), self.rows, backend=self.backend)
        receive_sizes = [num_tokens * columns for columns in self.widths]
        send_sizes = [count * width for count in mine]
        received = self.across.all_to_all(total.view(-1), send_sizes, receive_sizes, "values_across")
        return unpack_columns(received, self.column_cuts, num_tokens, 1, backend=self.backend)

    def send_output_grads(self, grad: Tensor, token_counts: list[int]) -> Tensor:
        """Phase B1: send each column shard its slice once, to the rank of the same row; share it inside.

        Args:
            grad: `[T, D]`.
            token_counts: tokens of each member.

        Returns:
            `[T_sum, D_j]`, the gradients of all members' tokens for this shard's columns. `b T (D - D_j)`
            bytes are sent across and `b Tcol D_j (R - 1)` inside.
        """
        by_row = self._tokens_by_row(token_counts)
        mine, width = by_row[self.inside.rank], self.widths[self.across.rank]
        send = pack_columns(grad, self.column_cuts, 1, backend=self.backend)
        send_sizes = [len(grad) * columns for columns in self.widths]
        receive_sizes = [count * width for count in mine]
        received = self.across.all_to_all(send, send_sizes, receive_sizes, "output_grads_across")
        held = received.view(sum(mine), width)
        shared = self.inside.share(held, [sum(counts) for counts in by_row], "output_grads_inside")
        # Back from row coordinates to member order.
        pieces = shared.split([count for counts in by_row for count in counts])
        return torch.cat([piece for column in range(self.columns) for piece in pieces[column :: self.columns]])
