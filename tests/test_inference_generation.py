"""Continuing prompts: which tokens are chosen, where texts end; the model is a rule that tests can follow."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mempar.errors import ConfigError, MemparError
from mempar.runtime.inference.generation import generate
from mempar.runtime.inference.sampling import Sampler, Sampling

NUM_TOKENS = 50


class Sums:
    """A model that is sure that the sum of all tokens so far follows them, and remembers what it was given."""

    max_length = 12

    def __init__(self) -> None:
        self.given: list[list[list[int]]] = []
        self.seen = torch.zeros(0, 0, dtype=torch.int64)

    def new_cache(self, batch_size: int, max_length: int) -> tuple[int, int]:
        self.seen = torch.zeros(batch_size, 0, dtype=torch.int64)
        return batch_size, max_length

    def logits(self, tokens: Tensor, cache: tuple[int, int], *, last_only: bool) -> Tensor:
        assert last_only
        self.given.append(tokens.tolist())
        self.seen = torch.cat([self.seen, tokens], 1)
        assert self.seen.shape[0] == cache[0] and self.seen.shape[1] <= cache[1]
        return torch.nn.functional.one_hot(self.seen.sum(1) % NUM_TOKENS, NUM_TOKENS).float()[:, None]


def continued(prompts: list[list[int]], model: Any = None, **settings: Any) -> list[list[int]]:
    return generate(model or Sums(), prompts, **{"max_new_tokens": 4, **settings})


def test_prompts_of_unequal_lengths_are_continued_as_if_alone() -> None:
    prompts = [[1, 2], [5], [1, 1, 1, 2, 2]]
    model = Sums()
    together = continued(prompts, model)
    assert (
        together == [continued([prompt])[0] for prompt in prompts] == [[3, 6, 12, 24], [5, 10, 20, 40], [7, 14, 28, 6]]
    )
    # The shortest prompt's length at once, then token by token.
    assert [len(given[0]) for given in model.given] == [1] * 8


def test_prompts_of_one_length_are_read_at_once() -> None:
    model = Sums()
    continued([[1, 2, 3], [4, 5, 6]], model, max_new_tokens=2)
    assert model.given == [[[1, 2, 3], [4, 5, 6]], [[6], [15]]]


def test_texts_end_at_a_stop_token_and_others_go_on() -> None:
    heard: list[tuple[int, int]] = []
    found = continued([[1, 2], [2, 2]], stop_tokens={6}, on_token=lambda *said: heard.append(said))
    assert found == [[3, 6], [4, 8, 16, 32]]
    assert heard == [(0, 3), (1, 4), (0, 6), (1, 8), (1, 16), (1, 32)]


def test_tokens_that_the_tokenizer_lacks_are_not_chosen() -> None:
    # The sum is 9, of which nothing is left: all others are alike, and the lowest is taken.
    assert continued([[4, 5]], max_new_tokens=1) == [[9]]
    assert continued([[4, 5]], max_new_tokens=1, vocab_size=9) == [[0]]
    sampling = Sampling(temperature=100.0, seed=3)
    found = [continued([[1]], max_new_tokens=11, vocab_size=7, sampling=replace(sampling, seed=n)) for n in range(5)]
    assert {token for ((*tokens,),) in found for token in tokens} == set(range(7))


def test_texts_end_with_the_context() -> None:
    assert [len(each) for each in continued([[1] * 10, [1] * 12], max_new_tokens=9)] == [2, 0]
    model = Sums()
    assert continued([[1]], model, max_new_tokens=0) == [[]] and not model.given


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 3.0]])
    assert Sampler(Sampling(), 2).choose(logits).tolist() == [1, 0]
    # A low temperature comes to the same.
    for temperature in (1e-3, 5e-324):
        assert Sampler(Sampling(temperature=temperature), 1).choose(torch.tensor([[0.0, 1.0, 2.0]])).tolist() == [2]


def drawn(logits: list[float], count: int, **settings: Any) -> list[float]:
    sampler = Sampler(Sampling(**settings), 1)
    tokens = [int(sampler.choose(torch.tensor([logits]))) for _ in range(count)]
    return [tokens.count(token) / count for token in range(len(logits))]


def test_draws_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    for settings, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        # The first is not enough, so the second is taken with it.
        ({"temperature": 1.0, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
    ):
        # Four standard deviations of 600 draws.
        assert drawn(logits, 600, **settings) == pytest.approx(expected, abs=0.082), settings


def test_sequences_draw_for_themselves_and_seeds_repeat() -> None:
    logits = torch.zeros(3, 1000)

    def of(seed: int, count: int) -> list[int]:
        return Sampler(Sampling(temperature=1.0, seed=seed), count).choose(logits[:count]).tolist()

    assert of(7, 3) == of(7, 3) and of(7, 3)[:1] == of(7, 1)
    assert len(set(of(7, 3))) == 3 and of(7, 3) != of(70, 3)


def test_drawn_texts_do_not_depend_on_what_is_in_the_batch() -> None:
    sampling = Sampling(temperature=5.0, seed=3)
    long = [1, 1, 1, 2, 2]
    (alone,) = continued([long], sampling=sampling)
    assert continued([long, [5]], sampling=sampling)[0] == alone == continued([long, [5, 6, 7]], sampling=sampling)[0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_said_to_be_so(number: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), 1)
    with pytest.raises(MemparError, match="logits are not finite"):
        sampler.choose(torch.tensor([[0.0, number, 1.0]]))
    # What is impossible is.
    assert sampler.choose(torch.tensor([[-float("inf"), 100.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top-p=0"),
        ({"top_p": 1.5}, "top-p=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**settings)
