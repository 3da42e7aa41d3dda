"""Tensor-parallel ranks that hold the same tokens share the lookup between them.

Without sequence parallelism all ranks of a tensor-parallel group see every token. Dense parts run on
all of them; each looks up its share of the tokens, the outputs are gathered, and in backward the
gradients of what was given (weights, or vectors of `dot`) are gathered, so that dense gradients stay
equal on all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempar.dims import even_cuts, part_sizes
from mempar.parallel.collectives import MemberGroup


class Reader(Protocol):
    """The reader that looks up one share."""

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Any:
        """Find the rows of slots `[T, M]`."""
        ...

    def read(self, found: Any, weight: Tensor) -> Tensor:
        """Sum the weighted rows `[T, D]` of every token."""
        ...

    def dot(self, found: Any, x: Tensor) -> Tensor:
        """Multiply chosen rows with a vector of their token: `[T, M]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """The rows of this rank's share of the tokens.

    Attributes:
        found: where `inner` found them.
        sizes: tokens of each tensor-parallel rank.
        mine: this rank's.
    """

    found: Any
    sizes: list[int]
    mine: slice


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

    def find(self, slot_index: Tensor, token_counts: list[int] | None = None) -> Share:
        """Find the rows of this rank's share.

        Args:
            slot_index: `[T, M] int64`, equal on all ranks of the tensor-parallel group.
            token_counts: T of every member of the memory-parallel group, where known.
        """
        sizes = part_sizes(len(slot_index), self.group.size)
        cuts = even_cuts(len(slot_index), self.group.size)
        mine = slice(cuts[self.group.rank], cuts[self.group.rank + 1])
        self.group.marks.note("split", [sizes[self.group.rank]])
        if token_counts is not None:
            token_counts = [
                part_sizes(count, self.group.size)[tp_rank]
                for count, tp_rank in zip(token_counts, self.member_tp_ranks, strict=True)
            ]
        return Share(found=self.inner.find(slot_index[mine], token_counts), sizes=sizes, mine=mine)

    def read(self, found: Share, weight: Tensor) -> Tensor:
        """Read as `inner` would read all tokens.

        Args:
            found: this rank's share, from `find`.
            weight: `[T, M]`, equal on all ranks of the tensor-parallel group; differentiable.

        Returns:
            `[T, D]`, equal likewise.
        """
        return self._shared(self.inner.read, found, weight)

    def dot(self, found: Share, x: Tensor) -> Tensor:
        """Multiply as `inner` would multiply all tokens: `[T, M]` of `x [T, D]`, both equal on all ranks."""
        return self._shared(self.inner.dot, found, x)

    def _shared(self, look_up: Callable[[Any, Tensor], Tensor], share: Share, given: Tensor) -> Tensor:
        """Look up this rank's share and gather the others'."""
        out = look_up(share.found, _TakeShare.apply(given, share, self.group))
        return _GatherShares.apply(out, share, self.group)


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, share: Share, group: MemberGroup) -> Tensor:
        ctx.sizes, ctx.group = share.sizes, group
        return given[share.mine].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.share(grad.contiguous(), ctx.sizes, "score_gather"), None, None


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, share: Share, group: MemberGroup) -> Tensor:
        ctx.mine = share.mine
        return group.share(out.contiguous(), share.sizes, "token_gather")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The gradient is equal on all ranks: what follows the lookup ran on all of them.
        return grad[ctx.mine].contiguous(), None, None
