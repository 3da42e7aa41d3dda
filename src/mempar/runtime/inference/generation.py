"""Continuing texts, token by token.

Prompts of one batch may differ in length: all are read up to the shortest one's end at once, and from there on a
sequence whose prompt goes on takes the prompt's tokens instead of chosen ones. So nothing is padded, and no position is
masked; prompts of very unequal lengths had better be in batches of their own.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from mempar.runtime.inference.forward import Forward
from mempar.runtime.inference.sampling import Sampler, Sampling


def generate(
    forward: Forward,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None = None,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue prompts until a stop token, or as long as the context or `max_new_tokens` allow.

    Args:
        forward: the model.
        prompt_tokens: at least one prompt, each of at least one token and at most `forward.max_length`.
        max_new_tokens: of each continuation.
        vocab_size: only tokens below it are chosen: a model may have embeddings beyond its tokenizer's tokens.
        sampling: how tokens are chosen; greedily by default.
        stop_tokens: tokens that end a continuation.
        on_token: called with the number of the prompt and a token as soon as that is chosen; True ends that prompt's
            continuation.

    Returns:
        The continuation of each prompt; the stop token that ended it is its last.
    """
    lengths = [len(prompt) for prompt in prompt_tokens]
    assert min(lengths) >= 1 and max(lengths) <= forward.max_length
    ends = [min(forward.max_length, length + max_new_tokens) for length in lengths]
    sampler = Sampler(sampling or Sampling(), len(lengths))
    texts = [list(prompt) for prompt in prompt_tokens]
    running = {place for place, length in enumerate(lengths) if length < ends[place]}
    cache = forward.new_cache(len(lengths), max(ends))
    done = min(lengths)
    step = torch.tensor([text[:done] for text in texts])
    while running:
        choosing = sorted(place for place in running if done >= lengths[place])
        logits = forward.logits(step, cache, last_only=True)[:, -1, :vocab_size]
        chosen = sampler.choose(logits, choosing).tolist()
        for place in choosing:
            token = chosen[place]
            texts[place].append(token)
            over = on_token is not None and on_token(place, token)
            if over or token in stop_tokens or len(texts[place]) == ends[place]:
                running.remove(place)
        # A sequence that has ended goes on with its last token, unheard.
        step = torch.tensor([[text[min(done, len(text) - 1)]] for text in texts])
        done += 1
    return [text[length:] for text, length in zip(texts, lengths, strict=True)]
