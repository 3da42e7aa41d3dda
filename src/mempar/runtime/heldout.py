"""The held-out loss, with two yardsticks beside it: trigram counts, and the model without its memory."""

import functools
import math
from pathlib import Path

import numpy as np

from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.data.manifest import read_index
from mempar.runtime.data.samples import Samples, micro_batches
from mempar.runtime.data.tokenizer import vocab_size
from mempar.runtime.data.trigram import trigram_loss
from mempar.runtime.model import Model
from mempar.runtime.step import Stepper


class Heldout:
    """A fixed set of held-out samples."""

    def __init__(self, run: RunConfig, world: World, stepper: Stepper, model: Model) -> None:
        self.run, self.world, self.stepper, self.model = run, world, stepper, model
        self.samples = Samples(run, run.data.heldout_paths, (), run.train.seed)

    def loss(self, *, memory: bool = True) -> float:
        """Mean token loss; every rank must call it. Not a number if the run is to stop: the rest is left out.

        Args:
            memory: False lets all lookups return zeros.
        """
        if not memory:
            with self.model.memory_off():
                return self.loss()
        grid, most = self.world.placement.grid, self.run.train.heldout_samples
        total, tokens = 0.0, 0
        for first in range(0, most, self.run.train.global_batch_size):
            batches = micro_batches(
                self.samples,
                self.run,
                first,
                count=min(self.run.train.global_batch_size, most - first),
                dp_rank=grid.dp_rank(self.world.rank),
                dp=grid.dp,
                device=self.world.device,
            )
            loss_sum, num_tokens = self.stepper.evaluate(batches)
            total, tokens = total + loss_sum, tokens + num_tokens
            if self.stepper.stopping.agreed:
                return math.nan
        return total / tokens

    @functools.cached_property
    def trigram_loss(self) -> float:
        """Loss of trigram counts over the training data on the very same windows, in nats a token."""
        train = np.concatenate([_flat_tokens(path) for path in self.run.data.paths])
        windows = np.stack([self.samples[index] for index in range(self.run.train.heldout_samples)])
        return trigram_loss(train, windows, vocab_size(self.run))


def _flat_tokens(path: str) -> np.ndarray:
    return np.fromfile(Path(path + ".bin"), dtype=read_index(path).dtype)
