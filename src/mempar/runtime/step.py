"""One pass over a global batch through megatron's schedules, forward only or with gradients.

The loss is per token: micro-batches hand megatron sums, and its finalisation divides gradients by the
number of unmasked tokens of the whole batch, so masked and uneven batches weigh tokens equally.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.runtime import mcore
from mempar.runtime.ballots import Ballots
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.data.samples import Batch, context_share
from mempar.runtime.launch.heartbeat import Heartbeat
from mempar.runtime.launch.stopping import Stopping
from mempar.runtime.model import Model
from mempar.runtime.optim import Inspector, Optimizers, StepReport
from mempar.runtime.schedule import LrFactors


class Stepper:
    """Runs global batches through a model.

    Attributes:
        stopping: whether the run is to stop.
        ballots: what ranks agree about in every batch, stopping first.
    """

    def __init__(
        self,
        run: RunConfig,
        world: World,
        model: Model,
        optimizers: Optimizers,
        stopping: Stopping | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.run, self.world, self.model, self.optimizers = run, world, model, optimizers
        self.stopping, self._heartbeat = stopping or Stopping(), heartbeat or Heartbeat()
        self.ballots = Ballots(self.stopping)
        self._num_tokens: Tensor | None = None
        model.transformer.finalize_model_grads_func = self._finalize

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        if num_tokens is not None:
            # Megatron scales gradients by 1 / num_tokens in the dtype of this quotient; of an integer it is float32.
            num_tokens = num_tokens.double()
        mcore.finalize_model_grads(chunks, num_tokens, **kwargs)
        # Megatron has just reduced it over the data-parallel ranks, in place.
        self._num_tokens = num_tokens

    def train(self, batches: list[Batch], factors: LrFactors, inspect: Inspector | None = None) -> StepReport:
        """Train on this rank's share of a global batch.

        Args:
            batches: this rank's micro-batches, equally many on every rank.
            factors: shares of the peak learning rates.
            inspect: see `Optimizers.step`.

        Returns:
            The step's numbers, equal on all ranks.
        """
        for chunk in self.model.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizers.dense.zero_grad()
        loss_sum, _ = self._schedule(batches, forward_only=False)
        assert self._num_tokens is not None
        return self.optimizers.step(factors, self._num_tokens, loss_sum, inspect, self.ballots)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """Sum of the token losses of all ranks' micro-batches and their tokens, equal on all ranks; changes nothing."""
        for chunk in self.model.wrapped:
            chunk.eval()
        return self._agree(self._schedule(batches, forward_only=True))

    def agree_to_stop(self) -> bool:
        """Whether any rank wishes to stop, between steps; every rank must call it, the host waits for all."""
        none = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._agree((none, none))
        return bool(self.stopping.agreed)

    def _agree(self, sums: tuple[Tensor, Tensor]) -> tuple[float, int]:
        """Reduce two sums, and what ranks agree about, over the world."""
        wishes = torch.tensor(self.ballots.wishes(), dtype=torch.float64, device=self.world.device)
        both = torch.cat([torch.stack(sums), wishes])
        dist.all_reduce(both)
        loss_sum, num_tokens, *wished = both.tolist()
        self.ballots.settle(wished)
        return loss_sum, int(num_tokens)

    def _schedule(self, batches: list[Batch], *, forward_only: bool) -> tuple[Tensor, Tensor]:
        """Run the schedule; return this rank's sums of losses and tokens (zero off the last stage)."""
        # The interleaved schedule walks the same micro-batches once for every virtual stage.
        iterators = [iter(batches) for _ in self.model.wrapped]
        schedule: Any = mcore.get_forward_backward_func()
        outputs = schedule(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model.wrapped,
            num_microbatches=len(batches),
            seq_length=self.run.train.seq_length,
            micro_batch_size=self.run.train.micro_batch_size,
            forward_only=forward_only,
        )
        self.model.in_flight.finish()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        if mcore.parallel_state.get_tensor_model_parallel_rank() == 0:
            # Tensor-parallel ranks all hold the same losses: one of them speaks.
            for output in outputs:
                sums += output["sums"]
        return sums[0], sums[1]

    def _forward(self, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        self._heartbeat.beat()
        batch = self.model.in_flight.current = context_share(next(batches))
        output = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)

        def loss(token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            mask = batch.loss_mask.to(token_losses.dtype)
            total, tokens = (token_losses * mask).sum(), batch.loss_mask.sum()
            # The schedule may change the loss in place: what is reported is a copy.
            sums = torch.stack([total.detach().double(), tokens.double()])
            return total, tokens.to(torch.int), {"sums": sums}

        return output, loss
