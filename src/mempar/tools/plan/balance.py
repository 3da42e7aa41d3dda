"""What a layout changes of losses that balance experts or reads: over which tokens these are taken.

A product of two means is not the mean of products, so such a loss is another one over other tokens. That of experts is
megatron's, over the tokens of a micro-batch, which its context- and tensor-parallel ranks add up; that of a memory is
over the tokens that a rank looks up (memory/balance.py).
"""

from mempar.runtime.config import RunConfig
from mempar.runtime.placement import resolve


def changes_of_balance(given: RunConfig, planned: RunConfig) -> list[str]:
    """What of the balance losses differs, in words.

    Args:
        given: the run as it was asked for, on the GPUs that it is meant for.
        planned: the run of a plan, resolved.
    """
    before = _tokens_at_a_time(resolve(given, given.num_gpus))
    return [
        f"{name} is taken over {tokens:,} tokens at a time instead of {before[name]:,}"
        for name, tokens in _tokens_at_a_time(planned).items()
        if tokens != before[name]
    ]


def _tokens_at_a_time(run: RunConfig) -> dict[str, int]:
    """Of each balance loss that a run has."""
    tokens, sizes = run.train.micro_batch_size * run.train.seq_length, run.parallel
    found = {"moe.aux_loss": tokens} if run.moe.enabled and run.moe.aux_loss else {}
    shares = sizes.cp * sizes.tp
    found |= {f"{name}.balance_loss": -(-tokens // shares) for name, each in run.memories.items() if each.balance_loss}
    return found
