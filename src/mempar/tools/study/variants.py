"""The models that are compared: each has the dense model's FLOPs a token, one has twice as many.

What a variant puts in the place of feed-forward networks costs FLOPs of its own: queries and keys of a memory, gates, a
router. The width of the feed-forward networks that are left makes up for it, so that all variants come out alike by the
count of `runtime/size.py`. Where one has parameters to choose (experts, PEER's slots), their total is that of Memory+
with a table of the same `slots`.
"""

import dataclasses
import math
from collections.abc import Callable

from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import DataConfig, ModelConfig, MoeConfig, OptimConfig, RunConfig, TrainConfig
from mempar.runtime.size import model_size
from mempar.tools.study.settings import Settings

DENSE, TWICE, MOE, PEER, MEMORY, MEMORY_PLUS = VARIANTS = (
    "dense",
    "dense_2x",
    "moe",
    "peer",
    "memory",
    "memory_plus",
)
# Variants without a table, whose `slots` are 0.
WITHOUT_SLOTS = (DENSE, TWICE)
# FLOPs a token may differ by so much from what they are matched to.
TOLERANCE = 0.02
# And parameters of experts and of PEER. Memory needs no look: its table is Memory+'s, and beside a table equal FLOPs
# are equal numbers of weights.
PARAMS_TOLERANCE = 0.05
_EXPERTS_OF_A_TOKEN = 2


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Entrant:
    """A model of the study.

    Attributes:
        variant: one of `VARIANTS`.
        slots: of the table, or of the Memory+ whose parameters are matched; 0 without.
    """

    variant: str
    slots: int = 0

    def __str__(self) -> str:
        return f"{self.variant}-{self.slots}" if self.slots else self.variant


def run_of(entrant: Entrant, settings: Settings, seed: int, data: DataConfig, vocab_size: int) -> RunConfig:
    """The run that trains a model.

    Args:
        entrant: the model.
        settings: of the study.
        seed: of initial values and of the order of the data.
        data: the corpus.
        vocab_size: of its tokenizer.

    Raises:
        ConfigError: when its FLOPs cannot be matched.
    """
    run = _matched_run(entrant, settings, _dense(settings, seed, data), vocab_size)
    lr = settings.lr_of.get(entrant.variant, settings.lr)
    optim = dataclasses.replace(run.optim, lr=lr, min_lr=lr * settings.final_lr_share)
    return dataclasses.replace(run, name=f"{entrant}-seed{seed}", optim=optim)


def _matched_run(entrant: Entrant, settings: Settings, dense: RunConfig, vocab_size: int) -> RunConfig:
    target = model_size(dense, vocab_size).flops_per_token
    if entrant.variant == DENSE:
        return dense
    if entrant.variant == TWICE:
        return _twice(dense, 2 * target, vocab_size)
    if entrant.variant in (MOE, PEER):
        same = Entrant(variant=MEMORY_PLUS, slots=entrant.slots)
        total = _params(_matched_run(same, settings, dense, vocab_size), vocab_size)
        if entrant.variant == MOE:
            return _experts(dense, settings, target, total, vocab_size)
        return _peer(entrant, dense, settings, target, total, vocab_size)
    run = _with_memory(dense, settings, entrant.variant, math.isqrt(entrant.slots))
    return _matched(lambda width: _with_ffn(run, width), target, vocab_size, entrant)


def _dense(settings: Settings, seed: int, data: DataConfig) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=settings.num_layers,
            hidden_size=settings.hidden_size,
            num_attention_heads=settings.attention_heads,
            ffn_hidden_size=settings.ffn_hidden_size,
            init_std=settings.init_std,
        ),
        optim=OptimConfig(
            warmup_steps=settings.warmup_steps, schedule=settings.schedule, weight_decay=settings.weight_decay
        ),
        train=TrainConfig(
            steps=settings.steps,
            seed=seed,
            global_batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size or settings.batch_size,
            seq_length=settings.seq_length,
            dtype=settings.dtype,
            save_interval=-(-settings.steps // 4),
            keep_checkpoints=1,
            log_interval=-(-settings.steps // 20),
        ),
        data=data,
    )


def _with_memory(dense: RunConfig, settings: Settings, variant: str, num_subkeys: int) -> RunConfig:
    memory = MemoryConfig(
        variant=variant,
        layers=settings.memory_plus_layers if variant == MEMORY_PLUS else settings.memory_layers,
        num_subkeys=num_subkeys,
        heads=settings.memory_heads,
        top_k=settings.top_k,
        key_dim=settings.key_dim,
        qk_norm=settings.qk_norm,
        lr=settings.values_lr,
        weight_decay=0.0,
        balance_loss=settings.balance_loss,
        column_tile=settings.hidden_size,
        usage_interval=settings.evaluation_interval,
        check_interval=0,
    )
    return dataclasses.replace(dense, memory=memory)


def _with_ffn(run: RunConfig, width: int) -> RunConfig:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, ffn_hidden_size=width))


def _twice(dense: RunConfig, target: int, vocab_size: int) -> RunConfig:
    return _matched(lambda width: _with_ffn(dense, width), target, vocab_size, Entrant(variant=TWICE))


def _peer(
    entrant: Entrant, dense: RunConfig, settings: Settings, target: int, total: int, vocab_size: int
) -> RunConfig:
    """PEER, whose two tables hold together what Memory+'s one does, or nearly: both are squares.

    Raises:
        ConfigError: when parameters do not come near a total.
    """
    num_subkeys = round(math.sqrt(entrant.slots / 2))
    run = _with_memory(dense, settings, PEER, num_subkeys)
    run = _matched(lambda width: _with_ffn(run, width), target, vocab_size, entrant)
    squares = f"its two tables of {num_subkeys * num_subkeys:,} slots stand for one of {entrant.slots:,}, all squares"
    _check_params(run, total, vocab_size, f"{squares}; use more slots, where squares lie closer")
    return run


def _check_params(run: RunConfig, total: int, vocab_size: int, why: str) -> None:
    """Refuse a model that does not come near a number of parameters."""
    found = _params(run, vocab_size)
    if abs(found - total) > PARAMS_TOLERANCE * total:
        variant = MOE if run.moe.num_experts else run.memory.variant
        raise ConfigError(
            f"{variant} takes at best {found:,} parameters where {total:,} are wanted, at equal FLOPs: {why}."
        )


def _experts(dense: RunConfig, settings: Settings, target: int, total: int, vocab_size: int) -> RunConfig:
    """Experts in all blocks, as many as bring the parameters nearest to a total.

    Raises:
        ConfigError: when they do not come near.
    """

    def with_experts(number: int) -> RunConfig:
        moe = MoeConfig(
            num_experts=number, top_k=_EXPERTS_OF_A_TOKEN, ffn_hidden_size=1, aux_loss=settings.balance_loss
        )
        run = dataclasses.replace(dense, moe=moe)
        return _matched(lambda width: _with_experts_of(run, width), target, vocab_size, Entrant(variant=MOE))

    best = with_experts(_EXPERTS_OF_A_TOKEN)
    why = "whole experts make steps that are too large; use more slots, or fewer"
    for number in range(_EXPERTS_OF_A_TOKEN + 1, total):
        try:
            found = with_experts(number)
        except ConfigError:
            # The router alone takes more FLOPs than there are.
            why = "routers of more experts cost more than the experts then may; use fewer slots, or a wider dense model"
            break
        best = min(best, found, key=lambda run: abs(_params(run, vocab_size) - total))
        # Not where they first fall: whole widths make steps down on the way up.
        if _params(found, vocab_size) >= total:
            break
    _check_params(best, total, vocab_size, why)
    return best


def _with_experts_of(run: RunConfig, width: int) -> RunConfig:
    return dataclasses.replace(run, moe=dataclasses.replace(run.moe, ffn_hidden_size=width))


def _params(run: RunConfig, vocab_size: int) -> int:
    return model_size(run, vocab_size).total_params


def _matched(of_width: Callable[[int], RunConfig], target: int, vocab_size: int, entrant: Entrant) -> RunConfig:
    """The run of the width whose FLOPs a token come nearest to a target: they grow linearly with it.

    Raises:
        ConfigError: when they do not come near, or no width changes them.
    """
    few, more = (model_size(of_width(width), vocab_size).flops_per_token for width in (1, 2))
    if few == more:
        setting = "memory_plus_layers" if entrant.variant == MEMORY_PLUS else "memory_layers"
        raise ConfigError(
            f"{entrant} has a table in every block ({setting}={list(of_width(1).memory.layers)}): no "
            "feed-forward network is left whose width could make up for its FLOPs; leave a block without a table."
        )
    run = of_width(max(1, 1 + round((target - few) / (more - few))))
    found = model_size(run, vocab_size).flops_per_token
    if abs(found - target) > TOLERANCE * target:
        raise ConfigError(
            f"{entrant} takes {found:,} FLOPs a token where {target:,} are wanted: what it puts in the place of "
            "feed-forward networks costs more than they did; use fewer slots, narrower keys, or a wider dense model."
        )
    return run
