"""How far a run has come: what changes from step to step and is saved with a checkpoint."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(kw_only=True)
class Progress:
    """Counters of a run, equal on all ranks.

    Attributes:
        step: steps done, applied or skipped.
        applied_steps: optimizer updates applied.
        tokens: unmasked tokens seen.
        samples: position in the data: the next batch begins with this sample. It is not a multiple of the
            step once a rollback has left out the batches of a spike.
        rollbacks: how often the run went back to a checkpoint.
        skips_in_a_row: steps skipped since the last one that was applied.
        losses: (step, loss) of the last applied steps, oldest first, as many as spikes are judged by.
    """

    step: int = 0
    applied_steps: int = 0
    tokens: int = 0
    samples: int = 0
    rollbacks: int = 0
    skips_in_a_row: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Steps that were not finite."""
        return self.step - self.applied_steps

    def advance(self, *, applied: bool, loss: float, tokens: int, samples: int, window: int) -> None:
        """Count a step.

        Args:
            applied: whether it changed the model.
            loss: its loss.
            tokens: its unmasked tokens.
            samples: samples of its batch.
            window: losses to remember; 0 for none.
        """
        self.step += 1
        self.applied_steps += applied
        self.tokens += tokens
        self.samples += samples
        self.skips_in_a_row = 0 if applied else self.skips_in_a_row + 1
        if applied and math.isfinite(loss):
            self.losses = [*self.losses, (self.step, loss)][-window:] if window else []

    def meta(self) -> dict[str, Any]:
        """Return what a checkpoint's description keeps, plain JSON."""
        return asdict(self)

    def restore(self, meta: dict[str, Any]) -> None:
        """Take over what a checkpoint's description says; one from before a counter was kept says nothing of it."""
        fresh = asdict(Progress())
        for name in (item.name for item in fields(self)):
            setattr(self, name, meta.get(name, fresh[name]))
        self.losses = [(step, loss) for step, loss in self.losses]
