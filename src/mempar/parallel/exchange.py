"""Reading a table that is cut over ranks: entries travel to the owners, sums travel back.

Four phases (letters as in cost.py):
  C   split sizes, where the host cannot know them
  F1  (row, weight) entries to the ranks of the row shard that owns them
  F2  each owner's weighted sums `[T_p, D_j]` to the rank p whose tokens they are
  B1  output gradients, column slice by column slice, to every owner
  B2  gradients of the weights back to the rank that sent the entry
An owner returns sums of rows, never rows. With one row shard (columns) every rank needs all entries,
so counts and sizes are known and C is empty, unless reads are merged; with one column shard (rows) an
entry has one owner; a grid is both at once. Row gradients are deposited where the rows are and do not
travel. F2 and B1, the bulk of the bytes, go in one hop or two (one_hop.py, two_hops.py); the rest is here.

The transpose, rows times a vector of each token, takes the same roads: vectors travel as output
gradients do (B1), products as score gradients (B2), and backward their gradients as weights (F1) and
the vectors' as values (F2). Tables that are cut alike share C and the rows of F1.

Every member of the group must make the same calls in the same order, with no tokens too.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.kernels.dispatch import Backend
from mempar.kernels.segment_route import Route, route
from mempar.parallel.collectives import MemberGroup
from mempar.parallel.one_hop import OneHop
from mempar.parallel.shard_plan import ShardPlan


class RowStore(Protocol):
    """The local shard, as far as the exchange needs it."""

    @property
    def values(self) -> Tensor:
        """`[S_i, D_j]`."""
        ...

    @property
    def backend(self) -> Backend:
        """What computes reads, and the routes to them."""
        ...

    def gather(self, row_index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sums of rows, bag by bag."""
        ...

    def backward(self, row_index: Tensor, weight: Tensor, offsets: Tensor, grad: Tensor) -> Tensor:
        """Deposit row gradients; return the gradient of the weights."""
        ...

    def dot(self, row_index: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Products of rows with the vector of their bag."""
        ...

    def dot_backward(self, row_index: Tensor, grad: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        """Deposit row gradients; return the gradient of the vectors."""
        ...


class ValueRoute(Protocol):
    """How sums and output gradients travel between a token's rank and the owners of its rows."""

    def return_values(self, partial: Tensor, token_counts: list[int]) -> Tensor:
        """Phase F2: from an owner's sums `[T_sum, D_j]` of all tokens to `[T, D]` of this rank's."""
        ...

    def send_output_grads(self, grad: Tensor, token_counts: list[int]) -> Tensor:
        """Phase B1: from `[T, D]` of this rank's tokens to an owner's columns `[T_sum, D_j]` of all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What this rank was asked for in one lookup, and how it asked the others.

    Attributes:
        shape: `[T, M]`, this rank's reads.
        routed: this rank's entries.
        receive_sizes: entries received from each member.
        token_counts: tokens of each member.
        row_index: `[received E] int32`, rows of this shard.
        offsets: `[T_sum + 1] int32`, where each token's entries start.
    """

    shape: torch.Size
    routed: Route
    receive_sizes: list[int]
    token_counts: list[int]
    row_index: Tensor
    offsets: Tensor


class ShardedReader:
    """Reads rows of a table whose shards lie on the members of one memory-parallel group."""

    def __init__(
        self,
        store: RowStore,
        plan: ShardPlan,
        group: MemberGroup,
        *,
        value_route: ValueRoute | None = None,
        merge: bool = False,
    ) -> None:
        """Join a shard with the group.

        Args:
            store: this rank's shard.
            plan: how the table is cut; its number of shards is the group's size.
            group: the memory-parallel group.
            value_route: how values and output gradients travel; by default in one hop over the group.
            merge: whether reads of a token that chose the same slot travel as one.
        """
        if plan.num_shards != group.size:
            raise ValueError(f"{plan.num_shards} shards need a group of that size, got {group.size} members.")
        self.store = store
        self.plan = plan
        self.group = group
        self.value_route = value_route or OneHop(plan, group, backend=store.backend)
        self.merge = merge
        # Where the slots will lie: copied once, because the host waits for a copy.
        self.row_cuts = torch.tensor(plan.row_cuts, device=store.values.device)

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Request:
        """Phase C and the rows of F1: tell the owners which rows this rank wants.

        Args:
            slot_index: `[T, M] int64`, M equal on all members.
            token_counts: T of every member, where known; otherwise they are exchanged too.

        Returns:
            What `read` and `dot` take, of this reader and of readers of other tables with the same row cuts in
            the same group.
        """
        marks = self.group.marks
        with marks.span("route"):
            routed = route(slot_index, self.row_cuts, merge=self.merge, backend=self.store.backend)
        marks.note("owned", [len(slot_index), *routed.sizes])
        receive_sizes, token_counts = self._sizes(slot_index, routed, token_counts)
        row_index = self._to_owners(routed.row_index, routed.sizes, receive_sizes)
        if routed.counts is None:
            reads = slot_index.shape[1]
            counts = torch.full((sum(token_counts),), reads, dtype=torch.int32, device=slot_index.device)
        else:
            num_tokens = [len(slot_index)] * self.plan.num_row_shards
            counts = self._to_owners(routed.counts.view(-1), num_tokens, token_counts).int()
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return Request(
            shape=slot_index.shape,
            routed=routed,
            receive_sizes=receive_sizes,
            token_counts=token_counts,
            row_index=row_index,
            offsets=offsets,
        )

    def read(self, found: Request, weight: Tensor) -> Tensor:
        """Sum the weighted rows of every token, wherever they lie.

        Args:
            found: the rows, from `find`.
            weight: `[T, M]`; differentiable.

        Returns:
            `[T, D]` in the table's dtype.
        """
        return _ShardedRead.apply(weight.to(self.store.values.dtype), found, self)

    def dot(self, found: Request, x: Tensor) -> Tensor:
        """Multiply chosen rows with a vector of their token, wherever they lie.

        Args:
            found: the rows, from `find`.
            x: `[T, D]`; differentiable.

        Returns:
            `[T, M]` in the table's dtype.
        """
        return _ShardedDot.apply(x.to(self.store.values.dtype), found, self)

    def send_weights(self, weight: Tensor, request: Request) -> Tensor:
        """The weights of F1: tell the owners how this rank's reads weigh.

        Args:
            weight: `[T, M]`.
            request: the reads that they belong to.

        Returns:
            `[received E]`.
        """
        routed = request.routed
        return self._to_owners(routed.to_entries(weight), routed.sizes, request.receive_sizes)

    def return_values(self, partial: Tensor, request: Request) -> Tensor:
        """Phase F2: from this shard's sums `[T_sum, D_j]` of all members' tokens to this rank's `[T, D]`."""
        return self.value_route.return_values(partial, request.token_counts)

    def send_output_grads(self, grad: Tensor, request: Request) -> Tensor:
        """Phase B1: from this rank's `[T, D]` to this shard's columns `[T_sum, D_j]` of all members' tokens."""
        return self.value_route.send_output_grads(grad, request.token_counts)

    def return_score_grads(self, score_grad: Tensor, request: Request) -> Tensor:
        """Phase B2: send each rank the gradient of its weights; add column shards.

        Args:
            score_grad: `[received E]`, this shard's part of the gradients.
            request: the reads that they belong to.

        Returns:
            `[T*M]`, for every read.
        """
        columns, routed = self.plan.num_column_shards, request.routed
        parts = self.group.all_to_all(score_grad, request.receive_sizes, routed.sizes * columns, "score_grads")
        # Column shards are added lowest first: members stand in their order, row shards fastest.
        return routed.to_reads(parts)

    def _to_owners(self, buckets: Tensor, sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Send bucket i, `sizes[i]` long, to every rank of row shard i: members stand in their order, over and over."""
        columns = self.plan.num_column_shards
        sent = buckets if columns == 1 else buckets.repeat(columns)
        return self.group.all_to_all(sent, sizes * columns, receive_sizes, "entries")

    def _sizes(self, slot_index: Tensor, routed: Route, token_counts: list[int] | None) -> tuple[list[int], list[int]]:
        """Phase C: entries and tokens to expect from each member; only what it cannot know is exchanged."""
        num_tokens, reads = slot_index.shape
        fixed = routed.counts is None
        told: list[list[int]] = [[] for _ in range(self.group.size)]
        if not fixed:
            told = [[size] for size in routed.sizes * self.plan.num_column_shards]
        if token_counts is None:
            told = [[*numbers, num_tokens] for numbers in told]
        if told[0]:
            told = self.group.exchange_counts(told, slot_index.device, "split_sizes")
        if token_counts is None:
            token_counts = [numbers[-1] for numbers in told]
        entries = [count * reads for count in token_counts] if fixed else [numbers[0] for numbers in told]
        return entries, token_counts


class _ShardedRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, request: Request, reader: ShardedReader) -> Tensor:
        owner_weight = reader.send_weights(weight.detach(), request)
        ctx.reader, ctx.request = reader, request
        ctx.save_for_backward(owner_weight)
        partial = reader.store.gather(request.row_index, owner_weight, request.offsets)
        return reader.return_values(partial, request)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        reader, request = ctx.reader, ctx.request
        (owner_weight,) = ctx.saved_tensors
        owner_grad = reader.send_output_grads(grad, request)
        score_grad = reader.store.backward(request.row_index, owner_weight, request.offsets, owner_grad)
        return reader.return_score_grads(score_grad, request).view(request.shape), None, None


class _ShardedDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, request: Request, reader: ShardedReader) -> Tensor:
        owner_x = reader.send_output_grads(x.detach(), request)
        ctx.reader, ctx.request = reader, request
        ctx.save_for_backward(owner_x)
        products = reader.store.dot(request.row_index, request.offsets, owner_x)
        return reader.return_score_grads(products, request).view(request.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        reader, request = ctx.reader, ctx.request
        (owner_x,) = ctx.saved_tensors
        owner_grad = reader.send_weights(grad, request)
        partial = reader.store.dot_backward(request.row_index, owner_grad, request.offsets, owner_x)
        return reader.return_values(partial, request), None, None
