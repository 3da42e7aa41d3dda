"""How the samples of a global batch are dealt out to ranks and micro-batches; integers only.

Micro-batch j of data-parallel rank d takes the samples from `(j * dp + d) * size` on. All ranks run
equally many micro-batches, because schedules and collectives need that; where the samples do not go
round, the last ones are padding: whole micro-batches, or the end of one. Padding is computed by the
dense parts without weight in the loss, and never looked up: a row that only padding chose would be
decayed and counted. Every rank knows every other's samples from this arithmetic alone.
"""

from dataclasses import dataclass

from mempar.runtime.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The cut of one batch.

    Attributes:
        num_samples: samples of the batch.
        micro_batch_size: samples of a micro-batch, padding included.
        dp: data-parallel size.
        multiple: the schedule takes multiples of so many micro-batches.
    """

    num_samples: int
    micro_batch_size: int
    dp: int
    multiple: int = 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every rank."""
        needed = -(-self.num_samples // (self.micro_batch_size * self.dp))
        return -(-needed // self.multiple) * self.multiple

    @property
    def num_padding(self) -> int:
        """Samples that are computed and do not count."""
        return self.num_micro_batches * self.micro_batch_size * self.dp - self.num_samples

    def samples_of(self, micro_batch: int, dp_rank: int) -> range:
        """Samples of one micro-batch, counted from the start of the batch; fewer where padding follows."""
        first = (micro_batch * self.dp + dp_rank) * self.micro_batch_size
        return range(min(first, self.num_samples), min(first + self.micro_batch_size, self.num_samples))

    def counts(self, micro_batch: int) -> list[int]:
        """Samples of one micro-batch on each data-parallel rank."""
        return [len(self.samples_of(micro_batch, dp_rank)) for dp_rank in range(self.dp)]


def plan_batch(run: RunConfig, dp: int, num_samples: int = 0) -> BatchPlan:
    """Cut a batch of a run.

    Args:
        run: micro-batch size and pipeline; its virtual stages and micro-batch size are resolved.
        dp: data-parallel size.
        num_samples: samples of the batch; 0 means the global batch.
    """
    return BatchPlan(
        num_samples=num_samples or run.train.global_batch_size,
        micro_batch_size=run.train.micro_batch_size,
        dp=dp,
        # Interleaved stages pass groups of as many micro-batches as there are stages.
        multiple=run.parallel.pp if run.parallel.vpp > 1 else 1,
    )
