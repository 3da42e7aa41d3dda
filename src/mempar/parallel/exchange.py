"""Reading a table that is cut over ranks: entries travel to the owners, sums travel back.

Four phases, each one all-to-all over the memory-parallel group (letters as in cost.py):
  C   split sizes, where the host cannot know them
  F1  (row, weight) entries to the ranks of the row shard that owns them
  F2  each owner's weighted sums `[T_p, D_j]` to the rank p whose tokens they are
  B1  output gradients, column slice by column slice, to every owner
  B2  gradients of the weights back to the rank that sent the entry
An owner returns sums of rows, never rows. With one row shard (columns) every rank needs all entries,
so counts and sizes are known and C is empty; with one column shard (rows) an entry has one owner; a
grid is both at once. Row gradients are deposited where the rows are and do not travel.

The transpose, rows times a vector of each token, takes the same roads: vectors travel as output
gradients do (B1), products as score gradients (B2), and backward their gradients as weights (F1) and
the vectors' as values (F2).

Every member of the group must make the same calls in the same order, with no tokens too.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.parallel.collectives import MemberGroup
from mempar.parallel.routing import RoutedEntries, route
from mempar.parallel.shard_plan import ShardPlan


class RowStore(Protocol):
    """The local shard, as far as the exchange needs it."""

    @property
    def values(self) -> Tensor:
        """`[S_i, D_j]`."""
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


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What this rank was asked for in one read, and how it asked the others."""

    routed: RoutedEntries
    send_sizes: list[int]  # entries sent to each member
    receive_sizes: list[int]  # entries received from each member
    token_counts: list[int]  # tokens of each member
    row_index: Tensor  # [received E] int32
    offsets: Tensor  # [T_sum + 1] int32


class ShardedReader:
    """Reads rows of a table whose shards lie on the members of one memory-parallel group."""

    def __init__(self, store: RowStore, plan: ShardPlan, group: MemberGroup) -> None:
        """Join a shard with the group.

        Args:
            store: this rank's shard.
            plan: how the table is cut; its number of shards is the group's size.
            group: the memory-parallel group.
        """
        if plan.num_shards != group.size:
            raise ValueError(f"{plan.num_shards} shards need a group of that size, got {group.size} members.")
        self.store = store
        self.plan = plan
        self.group = group
        self.row_cuts = plan.row_cuts
        self.columns = [plan.columns_of(member) for member in range(group.size)]

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Sum the weighted rows of every token, wherever they lie.

        Args:
            slot_index: `[T, M] int64`, M equal on all members.
            weight: `[T, M]`; differentiable.
            token_counts: T of every member, where known; otherwise they are exchanged too.

        Returns:
            `[T, D]` in the table's dtype.
        """
        return _ShardedRead.apply(weight.to(self.store.values.dtype), slot_index, token_counts, self)

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Multiply chosen rows with a vector of their token, wherever they lie.

        Args:
            slot_index: `[T, M] int64`, M equal on all members.
            x: `[T, D]`; differentiable.
            token_counts: as in `read`.

        Returns:
            `[T, M]` in the table's dtype.
        """
        return _ShardedDot.apply(x.to(self.store.values.dtype), slot_index, token_counts, self)

    def request(self, slot_index: Tensor, token_counts: list[int] | None) -> _Request:
        """Phases C and F1: tell the owners which rows this rank wants."""
        routed = route(slot_index, self.row_cuts)
        send_sizes = [routed.sizes[self.plan.row_shard(member)] for member in range(self.group.size)]
        receive_sizes, token_counts = self._sizes(slot_index, send_sizes, token_counts)
        row_index = self._to_owners(list(routed.row_index.split(routed.sizes)), receive_sizes)
        if routed.counts is None:
            reads = slot_index.shape[1]
            counts = torch.full((sum(token_counts),), reads, dtype=torch.int32, device=slot_index.device)
        else:
            counts = self._to_owners(list(routed.counts), token_counts).int()
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return _Request(
            routed=routed,
            send_sizes=send_sizes,
            receive_sizes=receive_sizes,
            token_counts=token_counts,
            row_index=row_index,
            offsets=offsets,
        )

    def send_weights(self, weight: Tensor, request: _Request) -> Tensor:
        """Phase F1: give the owners the number of every entry.

        Args:
            weight: `[T, M]`.
            request: where the entries went.

        Returns:
            `[received E]`.
        """
        routed = request.routed
        return self._to_owners(list(routed.sort(weight.reshape(-1)).split(routed.sizes)), request.receive_sizes)

    def _to_owners(self, buckets: list[Tensor], sizes: list[int]) -> Tensor:
        """Send bucket i to the members of row shard i, of which there is one in each column shard."""
        parts = [buckets[self.plan.row_shard(member)] for member in range(self.group.size)]
        return self.group.all_to_all(torch.cat(parts), [len(part) for part in parts], sizes, "entries")

    def _sizes(
        self, slot_index: Tensor, send_sizes: list[int], token_counts: list[int] | None
    ) -> tuple[list[int], list[int]]:
        """Phase C: entries and tokens to expect from each member."""
        num_tokens, reads = slot_index.shape
        every_entry = self.plan.num_row_shards == 1
        if token_counts is not None and every_entry:
            return [count * reads for count in token_counts], token_counts
        if token_counts is not None:
            received = self.group.exchange_counts([[n] for n in send_sizes], slot_index.device, "split_sizes")
            return [size for (size,) in received], token_counts
        if every_entry:
            received = self.group.exchange_counts([[num_tokens]] * self.group.size, slot_index.device, "split_sizes")
            return [count * reads for (count,) in received], [count for (count,) in received]
        pairs = [[size, num_tokens] for size in send_sizes]
        received = self.group.exchange_counts(pairs, slot_index.device, "split_sizes")
        return [size for size, _ in received], [count for _, count in received]

    def return_values(self, partial: Tensor, token_counts: list[int], num_tokens: int) -> Tensor:
        """Phase F2: send each rank the sums of its tokens; add row shards, join column shards.

        Args:
            partial: `[T_sum, D_j]`, this shard's sums for all members' tokens.
            token_counts: tokens of each member.
            num_tokens: T of this rank.

        Returns:
            `[T, D]`.
        """
        width = partial.shape[1]
        receive_sizes = [num_tokens * (end - start) for start, end in self.columns]
        send_sizes = [count * width for count in token_counts]
        received = self.group.all_to_all(partial.reshape(-1), send_sizes, receive_sizes, "values")
        out = partial.new_zeros(num_tokens, self.plan.value_dim)
        # Members in order: row shards are added lowest first, whatever this rank's own shard is.
        for piece, (start, end) in zip(received.split(receive_sizes), self.columns, strict=True):
            out[:, start:end] += piece.view(num_tokens, end - start)
        return out

    def send_output_grads(self, grad: Tensor, token_counts: list[int]) -> Tensor:
        """Phase B1: give every owner its columns of this rank's output gradient.

        Args:
            grad: `[T, D]`.
            token_counts: tokens of each member.

        Returns:
            `[T_sum, D_j]`, the gradients of all members' tokens for this shard's columns.
        """
        start, end = self.columns[self.group.rank]
        width = end - start
        send = torch.cat([grad[:, start:end].reshape(-1) for start, end in self.columns])
        send_sizes = [len(grad) * (end - start) for start, end in self.columns]
        received = self.group.all_to_all(send, send_sizes, [count * width for count in token_counts], "output_grads")
        return received.view(sum(token_counts), width)

    def return_score_grads(self, score_grad: Tensor, request: _Request) -> Tensor:
        """Phase B2: send each rank the gradient of its weights; add column shards.

        Args:
            score_grad: `[received E]`, this shard's part of the gradients.
            request: the forward pass that it belongs to.

        Returns:
            `[E]` in token order.
        """
        received = self.group.all_to_all(score_grad, request.receive_sizes, request.send_sizes, "score_grads")
        pieces = received.split(request.send_sizes)
        rows = self.plan.num_row_shards
        # Column shards are added lowest first; member m holds row shard m % R.
        buckets = [sum(pieces[shard + rows :: rows], pieces[shard]) for shard in range(rows)]
        return request.routed.unsort(torch.cat(buckets))


class _ShardedRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, slot_index: Tensor, token_counts: list[int] | None, reader: ShardedReader
    ) -> Tensor:
        request = reader.request(slot_index, token_counts)
        owner_weight = reader.send_weights(weight.detach(), request)
        ctx.reader, ctx.request, ctx.shape = reader, request, slot_index.shape
        ctx.save_for_backward(owner_weight)
        partial = reader.store.gather(request.row_index, owner_weight, request.offsets)
        return reader.return_values(partial, request.token_counts, len(slot_index))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        reader, request = ctx.reader, ctx.request
        (owner_weight,) = ctx.saved_tensors
        owner_grad = reader.send_output_grads(grad, request.token_counts)
        score_grad = reader.store.backward(request.row_index, owner_weight, request.offsets, owner_grad)
        return reader.return_score_grads(score_grad, request).view(ctx.shape), None, None, None


class _ShardedDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slot_index: Tensor, token_counts: list[int] | None, reader: ShardedReader
    ) -> Tensor:
        request = reader.request(slot_index, token_counts)
        owner_x = reader.send_output_grads(x.detach(), request.token_counts)
        ctx.reader, ctx.request, ctx.num_tokens = reader, request, len(slot_index)
        ctx.save_for_backward(owner_x)
        products = reader.store.dot(request.row_index, request.offsets, owner_x)
        return reader.return_score_grads(products, request).view(slot_index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        reader, request = ctx.reader, ctx.request
        (owner_x,) = ctx.saved_tensors
        owner_grad = reader.send_weights(grad, request)
        partial = reader.store.dot_backward(request.row_index, owner_grad, request.offsets, owner_x)
        return reader.return_values(partial, request.token_counts, ctx.num_tokens), None, None, None
