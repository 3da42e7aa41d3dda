"""Tensor-parallel ranks that hold the same tokens share the lookup between them.

Without sequence parallelism all ranks of a tensor-parallel group see every token. Dense parts run on
all of them; each looks up its share of the tokens, the outputs are gathered, and in backward the
gradients of what was given (weights, or vectors of `dot`) are gathered, so that dense gradients stay
equal on all of them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.dims import even_cuts, part_sizes
from mempar.parallel.collectives import MemberGroup


class Reader(Protocol):
    """The reader that looks up one share."""

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Sum the weighted rows `[T, D]` of every token."""
        ...

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Multiply chosen rows with a vector of their token: `[T, M]`."""
        ...


class TokenSplitReader:
    """Looks up this rank's share of the tokens and gathers the rest from its tensor-parallel peers."""

    def __init__(self, inner: Reader, tensor_group: MemberGroup, member_tp_ranks: list[int]) -> None:
        """Wrap a reader.

        Args:
            inner: reads the share.
            tensor_group: the ranks that hold the same tokens.
            member_tp_ranks: tensor-parallel rank of every member of the memory-parallel group.
        """
        self.inner = inner
        self.group = tensor_group
        self.member_tp_ranks = member_tp_ranks

    def read(self, slot_index: Tensor, weight: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Read as `inner` would read all tokens.

        Args:
            slot_index: `[T, M] int64`, equal on all ranks of the tensor-parallel group.
            weight: `[T, M]`, equal likewise; differentiable.
            token_counts: T of every member of the memory-parallel group, where known.

        Returns:
            `[T, D]`, equal on all ranks of the tensor-parallel group.
        """
        return self._shared(self.inner.read, slot_index, weight, token_counts)

    def dot(self, slot_index: Tensor, x: Tensor, token_counts: list[int] | None = None) -> Tensor:
        """Multiply as `inner` would multiply all tokens; arguments `[T, M]` and `[T, D]` are equal on all ranks."""
        return self._shared(self.inner.dot, slot_index, x, token_counts)

    def _shared(
        self,
        look_up: Callable[[Tensor, Tensor, list[int] | None], Tensor],
        slot_index: Tensor,
        given: Tensor,
        token_counts: list[int] | None,
    ) -> Tensor:
        """Look up this rank's share and gather the others'."""
        sizes = part_sizes(len(slot_index), self.group.size)
        cuts = even_cuts(len(slot_index), self.group.size)
        mine = slice(cuts[self.group.rank], cuts[self.group.rank + 1])
        if token_counts is not None:
            token_counts = [
                part_sizes(count, self.group.size)[tp_rank]
                for count, tp_rank in zip(token_counts, self.member_tp_ranks, strict=True)
            ]
        share = look_up(slot_index[mine], _TakeShare.apply(given, sizes, mine, self.group), token_counts)
        return _GatherShares.apply(share, sizes, mine, self.group)


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, sizes: list[int], mine: slice, group: MemberGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return given[mine].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.share(grad.contiguous(), ctx.sizes, "score_gather"), None, None, None


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, sizes: list[int], mine: slice, group: MemberGroup) -> Tensor:
        ctx.mine = mine
        return group.share(share.contiguous(), sizes, "token_gather")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # The gradient is equal on all ranks: what follows the lookup ran on all of them.
        return grad[ctx.mine].contiguous(), None, None, None
