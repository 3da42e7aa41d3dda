"""Which micro-batch a layer is computing, in the first pass and when it is computed again in backward.

The schedule says which micro-batch it hands to the model, but a layer whose activations are not kept
runs a second time, inside the backward pass, when the schedule has long handed out others. So a layer
that will run again notes the micro-batch of every first pass and takes the notes back in that order:
megatron's schedules differentiate the micro-batches of a chunk in the order in which it computed them,
with and without interleaving.
"""

from collections import deque
from dataclasses import dataclass

import torch

from mempar.runtime.data.samples import Batch


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One computation of one layer.

    Attributes:
        batch: its micro-batch.
        again: whether it repeats a pass, for the backward pass: what was counted then is not counted again.
    """

    batch: Batch
    again: bool


class InFlight:
    """Micro-batches on their way through this rank's part of the model.

    Attributes:
        current: the micro-batch that the schedule handed out last.
        runs_again: whether memory layers are computed again in backward.
    """

    def __init__(self, *, runs_again: bool) -> None:
        self.current: Batch | None = None
        self.runs_again = runs_again
        self._waiting: dict[int, deque[Batch]] = {}

    def enter(self, block: int, *, training: bool) -> Pass:
        """Say what a layer is about to compute; it must call this once in every pass.

        Args:
            block: the layer's block.
            training: whether a backward pass follows.
        """
        waiting = self._waiting.setdefault(block, deque())
        # Megatron's checkpoints run the first pass without gradients and the second with them.
        if self.runs_again and training and torch.is_grad_enabled():
            return Pass(batch=waiting.popleft(), again=True)
        assert self.current is not None
        if self.runs_again and training:
            waiting.append(self.current)
        return Pass(batch=self.current, again=False)

    def finish(self) -> None:
        """Forget the last micro-batch when a schedule is through; every note has been taken back by then."""
        left = {block: len(waiting) for block, waiting in self._waiting.items() if waiting}
        assert not left, f"passes that backward did not repeat, by block: {left}"
        self.current = None
