"""Tokens: Megatron's indexed files, mixed and shuffled so that position is one number.

Sample i of a run is a pure function of (i, seed, data): which data set it comes from is a closed form
(`blend.py`), and every pass over a data set has its own shuffle. Nothing depends on the
number of steps or on the data-parallel size, so a resumed or lengthened run sees the same samples.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempar.runtime import mcore
from mempar.runtime.config import RunConfig
from mempar.runtime.data.batch_plan import plan_batch
from mempar.runtime.data.blend import Blend
from mempar.runtime.data.check import check_length, check_tokens
from mempar.runtime.data.tokenizer import MegatronTokenizer, vocab_size


class Samples:
    """All samples of some data sets, in the order in which a run reads them."""

    def __init__(self, run: RunConfig, paths: tuple[str, ...], weights: tuple[float, ...], seed: int) -> None:
        """Open the data sets.

        Args:
            run: sequence length, tokenizer and cache directory.
            paths: prefixes of .bin/.idx pairs.
            weights: share of each; empty means in proportion to their samples.
            seed: of the shuffles.
        """
        self.seed = seed
        self.paths = paths
        self.sets = [_one_pass(run, path, seed) for path in paths]
        self._num_embeddings = run.model.vocab_size or vocab_size(run)
        self._blend = Blend(weights or tuple(len(data) for data in self.sets))
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens `[seq_length + 1] int64` of sample `index`, any number from 0.

        Raises:
            ConfigError: for a token beyond the vocabulary.
        """
        which, ordinal = self._blend.locate(index)
        data = self.sets[which]
        epoch, place = divmod(ordinal, len(data))
        sample = data[int(self._order(which, epoch)[place])]
        tokens = np.concatenate([sample["tokens"].numpy(), sample["labels"][-1:].numpy()])
        # An embedding that is cut over ranks answers ids beyond it with zeros.
        check_tokens(self.paths[which], tokens, self._num_embeddings)
        return tokens

    def _order(self, which: int, epoch: int) -> np.ndarray:
        if (which, epoch) not in self._orders:
            shuffle = np.random.default_rng([self.seed, which, epoch])
            self._orders[which, epoch] = shuffle.permutation(len(self.sets[which]))
        return self._orders[which, epoch]


def _one_pass(run: RunConfig, path: str, seed: int) -> Any:
    """One epoch of a .bin/.idx pair as fixed-length samples, through Megatron's GPTDataset."""
    indexed = mcore.IndexedDataset(path)
    check_length(path, int(indexed.sequence_lengths.sum()), run.train.seq_length)
    config = mcore.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=run.train.seq_length,
        tokenizer=MegatronTokenizer(name=run.data.tokenizer, vocab_size=vocab_size(run)),  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        split="1,0,0",
        path_to_cache=None,
    )
    # GPTDataset takes sequences here; a document may hold several.
    sequences = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return mcore.GPTDataset(indexed, path, sequences, None, mcore.Split.train, config)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch; its samples come first, and what follows them is padding.

    Attributes:
        tokens: `[b, s] int64`; 0 in padding.
        labels: `[b, s] int64`.
        loss_mask: `[b, s] float32`; 0 in padding.
        position_ids: `[b, s] int64`.
        sample_ids: numbers of its samples in the run, at most b.
        sample_counts: samples of the same micro-batch on each data-parallel rank.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sample_ids: list[int]
    sample_counts: list[int]


def context_share(batch: Batch) -> Batch:
    """This context-parallel rank's positions of a micro-batch: of 2 cp equal chunks an early and a late one."""
    if mcore.parallel_state.get_context_parallel_world_size() == 1:
        return batch
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return replace(batch, **mcore.get_batch_on_this_cp_rank({name: getattr(batch, name) for name in names}))


def micro_batches(
    samples: Samples, run: RunConfig, first: int, *, count: int, dp_rank: int, dp: int, device: torch.device
) -> list[Batch]:
    """This rank's micro-batches of `count` samples from sample `first` on, dealt out as batch_plan.py says."""
    plan, size, length = plan_batch(run, dp, count), run.train.micro_batch_size, run.train.seq_length
    batches = []
    for micro_batch in range(plan.num_micro_batches):
        ids = [first + place for place in plan.samples_of(micro_batch, dp_rank)]
        tokens = np.zeros((size, length + 1), dtype=np.int64)
        mask = torch.zeros(size, length)
        for place, sample in enumerate(ids):
            tokens[place] = samples[sample]
            mask[place] = 1.0
        on_device = torch.from_numpy(tokens).to(device)
        batches.append(
            Batch(
                tokens=on_device[:, :-1].contiguous(),
                labels=on_device[:, 1:].contiguous(),
                loss_mask=mask.to(device),
                position_ids=torch.arange(length, device=device).expand(size, -1),
                sample_ids=ids,
                sample_counts=plan.counts(micro_batch),
            )
        )
    return batches
