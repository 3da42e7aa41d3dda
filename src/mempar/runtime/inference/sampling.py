"""Choosing the next token: the likeliest, or one drawn from what temperature and top-p leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mempar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: by which logits are divided; 0 takes the likeliest token, the lowest of equals.
        top_p: draw from the likeliest tokens that have this probability together; 1 is all of them.
        seed: of the draws. Each sequence has draws of its own, whatever else is in its batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature:g}: logits are divided by it, and 0 takes the likeliest token; use 0 "
                "or a positive number."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top-p={self.top_p:g}: it is the share of the probability that is drawn from; use a number above 0 "
                "and up to 1."
            )


class Sampler:
    """Chooses tokens for a number of sequences."""

    def __init__(self, sampling: Sampling, num_sequences: int) -> None:
        self.sampling = sampling
        # On the CPU: the same draws on every device.
        self._draws = [torch.Generator() for _ in range(num_sequences)]
        for place, draws in enumerate(self._draws):
            draws.manual_seed(sampling.seed + place)

    def choose(self, logits: Tensor) -> Tensor:
        """Choose a token for each sequence.

        Args:
            logits: `[b, V]`.

        Returns:
            `[b] int64`, on the device of the logits.
        """
        if not self.sampling.temperature:
            return logits.argmax(-1)
        kept, order = _kept(logits, self.sampling)
        ends = kept.cumsum(-1)
        drawn = torch.tensor([torch.rand((), dtype=torch.float64, generator=each).item() for each in self._draws])
        place = torch.searchsorted(ends, drawn.to(ends)[:, None] * ends[:, -1:], right=True)
        # What rounding carries beyond the end belongs to the last token that was kept.
        last = (kept > 0).sum(-1, keepdim=True) - 1
        return order.gather(-1, place.minimum(last)).squeeze(-1)


def _kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities `[b, V]` in descending order, zero where they are not drawn from, and their tokens `[b, V]`."""
    probability = (logits.double() / sampling.temperature).softmax(-1)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    # A token stays while those before it do not make up top_p; the first stays always.
    before = probability.cumsum(-1) - probability
    return torch.where(before < sampling.top_p, probability, 0.0), order
