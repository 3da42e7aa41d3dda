"""Logits of a model, of whole sequences or token by token with a cache of keys and values.

The forward pass is megatron's own, with its static inference context as the cache. It changes nothing in the model:
no gradients, evaluation mode, no reads counted. It stands beside megatron's schedules, so all blocks have to lie on one
pipeline stage.
"""

import torch
from torch import Tensor

from mempar.errors import ConfigError
from mempar.runtime import mcore
from mempar.runtime.bringup import World
from mempar.runtime.config import RunConfig
from mempar.runtime.data.samples import Batch
from mempar.runtime.model import Model


class KeyValueCache:
    """Keys and values of the tokens that a batch of sequences has so far.

    Attributes:
        batch_size: b.
        max_length: tokens of a sequence at the most.
        context: megatron's.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.batch_size, self.max_length = batch_size, max_length
        self.context = mcore.StaticInferenceContext(batch_size, max_length)

    @property
    def length(self) -> int:
        """Tokens of each sequence so far."""
        return self.context.sequence_len_offset

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens of every sequence."""
        assert 0 <= length <= self.length
        self.context.sequence_len_offset = length


class Forward:
    """The forward pass of a model, opened from a checkpoint or in training.

    Attributes:
        vocab_size: V, tokens of the tokenizer.
        max_length: s of training: what lies beyond it, the model has never seen.
        device: where tokens and logits lie.
    """

    def __init__(self, model: Model, run: RunConfig, world: World, vocab_size: int) -> None:
        """Take a model.

        Args:
            model: as it is, now and later.
            run: its settings and layout.
            world: the ranks that it lies on.
            vocab_size: tokens of the tokenizer, before padding.

        Raises:
            ConfigError: for a layout that cuts blocks or sequences over ranks.
        """
        sizes = run.parallel
        if sizes.pp > 1 or sizes.cp > 1 or sizes.sequence_parallel:
            raise ConfigError(
                f"parallel.pp={sizes.pp}, cp={sizes.cp}, sequence_parallel={str(sizes.sequence_parallel).lower()}: "
                "logits are computed where a rank has all blocks and whole sequences; save a checkpoint and open that, "
                "which works from any layout, or train with pp=1, cp=1 and without sequence parallelism."
            )
        self.vocab_size, self.max_length, self.device = vocab_size, run.train.seq_length, world.device
        self._model, self._dp = model, world.placement.grid.dp
        self._chunk = model.wrapped[0]

    def new_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        """An empty cache for a batch of sequences of at most `max_length` tokens."""
        return KeyValueCache(batch_size, max_length)

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, cache: KeyValueCache | None = None, *, last_only: bool = False, padded: bool = False
    ) -> Tensor:
        """Compute logits; where tables or blocks are cut over ranks, every rank must call it with as many tokens.

        What follows a token does not change its logits, so sequences of unequal lengths may be padded on the right.

        Args:
            tokens: `[b, s] int64`, s at least 1.
            cache: what came before these tokens, to which they are added; None for nothing.
            last_only: whether only the last token's logits are wanted.
            padded: whether logits of the vocabulary's padding are wanted as well. The loss of training is normalised
                over them too, so probabilities that are to agree with it need them.

        Returns:
            `[b, s, V]`, or `[b, 1, V]`, in float32 at least; with `padded`, V is the number of embeddings.
        """
        batch_size, length = tokens.shape
        if cache is None and last_only:
            cache = self.new_cache(batch_size, length)
        start = 0 if cache is None else cache.length
        if cache is not None and (batch_size != cache.batch_size or start + length > cache.max_length):
            raise ValueError(
                f"tokens {list(tokens.shape)} after {start} do not fit a cache of {cache.batch_size} sequences of "
                f"{cache.max_length} tokens"
            )
        tokens = tokens.to(self.device)
        positions = torch.arange(start, start + length, device=self.device).expand(batch_size, -1)
        if self._chunk.training:
            self._chunk.eval()
        in_flight = self._model.in_flight
        in_flight.current = self._batch(tokens, positions)
        if cache is not None:
            cache.context.materialize_only_last_token_logits = last_only
        context = None if cache is None else cache.context
        try:
            found = self._chunk(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        finally:
            in_flight.finish()
        if cache is not None:
            cache.context.increment_sequence_len_offset(length)
        found = found if padded else found[..., : self.vocab_size]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _batch(self, tokens: Tensor, positions: Tensor) -> Batch:
        """What memory layers ask of a micro-batch: all its samples count, and so do other ranks'."""
        return Batch(
            tokens=tokens,
            labels=tokens,
            loss_mask=torch.ones_like(tokens, dtype=torch.float32),
            position_ids=positions,
            sample_ids=list(range(len(tokens))),
            sample_counts=[len(tokens)] * self._dp,
        )
