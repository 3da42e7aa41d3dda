"""Tiny twins: any recipe with the same structure and small sizes, for a CPU with two cores.

What stays: the variant, how many memory layers there are and where among the blocks, tables larger or smaller than
others', experts, every choice of the optimizers, precision, schedule, spikes and checkpoints, and which parallel
dimensions there are, on four ranks at most. What does not: sizes, and data, which become the bytes of the standard
library's text. Context parallelism, which a CPU cannot do, is dropped.
"""

from collections.abc import Iterable
from dataclasses import replace

from mempar.memory.config import MemoryConfig
from mempar.runtime.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

SUFFIX = "_tiny"
MAX_RANKS = 4
_BLOCKS, _HEADS, _WIDTH, _FFN = 6, 4, 64, 96
_STEPS, _BATCH, _LENGTH = 10, 8, 32
_DEPOSIT_BYTES = 1 << 14
# What the smoke recipe learns at; the rates of wide models would show nothing in ten steps.
_LEAST_LR = 3e-3


def tiny(run: RunConfig) -> RunConfig:
    """Shrink a run; it trains a step in well under a second."""
    sizes = _layout(run.parallel)
    blocks = _num_blocks(run, sizes)
    ours = {name: _scaled(memory.layers, run.model.num_layers, blocks) for name, memory in run.memories.items()}
    faster = max(1.0, _LEAST_LR / run.optim.lr) if run.optim.lr else 1.0
    memories = [_memory(memory, ours[name], faster) for name, memory in run.memories.items()]
    return replace(
        run,
        name=run.name + SUFFIX,
        model=_model(run.model, blocks),
        memory=memories[0] if memories else replace(run.memory, layers=()),
        more_memories=tuple(memories[1:]),
        moe=_experts(run, blocks),
        parallel=sizes,
        optim=_optim(run.optim, faster),
        train=_train(run.train),
        data=DataConfig(
            corpus="stdlib", tokenizer="byte", cache=run.data.cache, trigram_baseline=run.data.trigram_baseline
        ),
        hardware=HardwareConfig(),
    )


def _layout(sizes: ParallelConfig) -> ParallelConfig:
    """Two of every dimension that there is, and a grid of two by two where the pipeline leaves the ranks."""
    tp, pp, ep = (min(2, size) for size in (sizes.tp, sizes.pp, sizes.ep))
    # Tensor and expert parallelism multiply: of three dimensions the experts' gives way.
    ep = ep if tp * pp * ep <= MAX_RANKS else 1
    # A power of two, so that it goes round with the others.
    mp = next(size for size in (4, 2, 1) if size <= min(sizes.mp, MAX_RANKS // pp))
    rows, columns = sizes.mp_rows, sizes.mp // max(1, sizes.mp_rows)
    if rows:
        rows = mp if columns == 1 else 1 if rows == 1 else max(1, mp // 2)
    return replace(
        sizes,
        tp=tp,
        pp=pp,
        cp=1,
        ep=ep,
        vpp=min(sizes.vpp, 2) if pp > 1 else 1,
        mp=mp,
        mp_rows=rows,
        mp_hops=sizes.mp_hops if 1 < rows < mp else 1,
    )


def _num_blocks(run: RunConfig, sizes: ParallelConfig) -> int:
    """The fewest blocks, from six on, that stages share equally and that keep memory layers apart."""
    share, whole = sizes.pp * max(1, sizes.vpp), run.model.num_layers
    for blocks in range(-(-min(_BLOCKS, whole) // share) * share, whole, share):
        if len(set(_scaled(run.memory_layers, whole, blocks))) == len(run.memory_layers):
            return blocks
    return whole


def _scaled(layers: Iterable[int], whole: int, blocks: int) -> tuple[int, ...]:
    """Blocks in the same places of a shorter model."""
    return tuple(min(round(block * blocks / whole), blocks - 1) for block in layers)


def _model(model: ModelConfig, blocks: int) -> ModelConfig:
    grouped = model.query_groups < model.num_attention_heads
    return replace(
        model,
        num_layers=blocks,
        hidden_size=_WIDTH,
        num_attention_heads=_HEADS,
        num_query_groups=_HEADS // 2 if grouped else 0,
        ffn_hidden_size=_FFN,
        vocab_size=0,
        # Near 1 / sqrt(width): the bases' .02 is for wide models.
        init_std=max(model.init_std, 0.1),
    )


def _memory(memory: MemoryConfig, layers: tuple[int, ...], faster: float) -> MemoryConfig:
    return replace(
        memory,
        layers=layers,
        # Larger tables stay larger than others.
        num_subkeys=max(8, memory.num_subkeys // 64),
        heads=min(2, memory.heads),
        top_k=min(4, memory.top_k),
        key_dim=_WIDTH // 2,
        value_dim=_WIDTH // 2 if memory.value_dim and memory.variant == "memory_plus" else 0,
        column_tile=_WIDTH // 4,
        deposit_bytes=min(_DEPOSIT_BYTES, memory.deposit_bytes),
        lr=memory.lr * faster,
        usage_interval=min(1, memory.usage_interval),
        check_interval=min(2, memory.check_interval),
    )


def _experts(run: RunConfig, blocks: int) -> MoeConfig:
    taken = set(_scaled(run.memory_layers, run.model.num_layers, blocks))
    layers = sorted(
        set(_scaled((block for block in run.moe.layers if block not in taken), run.model.num_layers, blocks))
    )
    return replace(run.moe, ffn_hidden_size=_FFN // 2 if run.moe.ffn_hidden_size else 0, layers=tuple(layers))


def _optim(optim: OptimConfig, faster: float) -> OptimConfig:
    return replace(
        optim,
        lr=optim.lr * faster,
        min_lr=optim.min_lr * faster,
        warmup_steps=min(2, optim.warmup_steps),
        decay_steps=0,
        wsd_decay_steps=min(2, optim.wsd_decay_steps),
    )


def _train(train: TrainConfig) -> TrainConfig:
    return replace(
        train,
        steps=_STEPS,
        global_batch_size=_BATCH,
        micro_batch_size=1,
        seq_length=_LENGTH,
        save_interval=min(_STEPS // 2, train.save_interval),
        spike_skips=min(_STEPS // 2, train.spike_skips),
        peak_tflops=0.0,
        log_interval=1,
        heldout_interval=0,
        heldout_samples=min(_BATCH, train.heldout_samples),
        collective_timeout=min(600, train.collective_timeout),
    )
