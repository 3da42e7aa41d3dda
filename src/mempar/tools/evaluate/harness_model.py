"""What the harness asks of a model, answered by the engine: likelihoods, likelihoods of whole texts, continuations.

Texts become tokens here, tokens become rows in batches of similar lengths, and workers compute them. The answers are
those of the harness's own class for transformers' models (HFLM), given the same weights.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from mempar.errors import ConfigError
from mempar.runtime.data.encoders import Encoder
from mempar.runtime.inference.sampling import Sampling
from mempar.tools.bars import counting_bars
from mempar.tools.evaluate.rows import Row, batches, encode_pairs, encode_texts, make_rows, window_rows
from mempar.tools.evaluate.sizes import BatchSizes
from mempar.tools.evaluate.work import Prompts, continue_prompts, score_rows
from mempar.tools.evaluate.workers import Map

# Where a task does not say it: HFLM's.
_MAX_NEW_TOKENS = 256
# What `normalize_gen_kwargs` leaves, and sampling knows.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
# What says nothing where the likeliest token is taken.
_OF_SAMPLING = {"top_k", "min_p", "typical_p"}


@dataclass(frozen=True, kw_only=True)
class _Manner:
    """How requests are to be continued; see Prompts and Sampling."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


class HarnessModel(LM):
    """A checkpoint, as the harness sees it."""

    def __init__(self, spread: Map, encoder: Encoder, *, max_length: int, sizes: BatchSizes, seed: int) -> None:
        """Answer with what workers compute.

        Args:
            spread: deals out work.
            encoder: the tokenizer.
            max_length: tokens that the model reads at a time.
            sizes: of batches.
            seed: of drawn continuations.
        """
        super().__init__()
        self._spread, self._encoder, self._max_length, self._sizes = spread, encoder, max_length, sizes
        self._seed = seed
        self._cut, self._shortened = Counter[str](), dict[str, int]()

    @property
    def notes(self) -> list[str]:
        """What was done otherwise than the tasks ask, because the model reads too few tokens at a time."""
        reads = f"the model reads {self._max_length} tokens at a time"
        found = [f"{task}: {count} texts lost their beginnings: {reads}" for task, count in self._cut.items() if count]
        for task, asked in self._shortened.items():
            found.append(f"{task}: continuations have at most {self._room(asked)} tokens, not {asked}: {reads}")
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score continuations of contexts: the logarithm of the likelihood, and whether greedy choice gives it."""
        pairs = encode_pairs(self._encoder, [request.args for request in requests])
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            self._cut[request.task_name] += len(context) + len(continuation) > self._max_length + 1
        rows, places = make_rows(pairs, self._max_length)
        scores = self._score(rows, "likelihoods")
        return [scores[row][ending] for row, ending in places]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Score whole texts, every token once."""
        texts = [text for (text,) in (request.args for request in requests)]
        tokens = encode_texts(self._encoder, texts)
        rows = [window_rows(tokens[text], self._encoder.eod, self._max_length) for text in texts]
        scores = iter(self._score([row for own in rows for row in own], "likelihoods of texts"))
        return [sum(next(scores)[0][0] for _ in own) for own in rows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue prompts, each as its task says."""
        jobs = list(self._jobs(requests))
        found = [""] * len(requests)
        with counting_bars() as begin:
            advance = begin("continuations", len(requests))
            answers = self._spread(continue_prompts, [job for _, job in jobs])
            for (numbers, _), texts in zip(jobs, answers, strict=True):
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                advance(len(numbers))
        return found

    def _jobs(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], Prompts]]:
        """Batches of requests that are continued alike, with the requests' numbers."""
        tokens = encode_texts(self._encoder, [request.args[0] for request in requests])
        alike: dict[_Manner, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self._manner(request.task_name, request.args[1])].append(number)
        drawn = 0
        for manner, numbers in alike.items():
            room = self._max_length - manner.max_new_tokens
            prompts = [tokens[requests[number].args[0]] or [self._encoder.eod] for number in numbers]
            for number, prompt in zip(numbers, prompts, strict=True):
                self._cut[requests[number].task_name] += len(prompt) > room
            prompts = [prompt[-room:] for prompt in prompts]
            for batch in batches([len(prompt) for prompt in prompts], self._sizes.prompts):
                # Each sequence of a batch draws from the next seed.
                sampling = Sampling(temperature=manner.temperature, top_p=manner.top_p, seed=self._seed + drawn)
                drawn += len(batch)
                yield (
                    [numbers[place] for place in batch],
                    Prompts(
                        tokens=[prompts[place] for place in batch],
                        max_new_tokens=manner.max_new_tokens,
                        until=manner.until,
                        sampling=sampling,
                    ),
                )

    def _score(self, rows: Sequence[Row], what: str) -> list[list[tuple[float, bool]]]:
        """Scores of each row's endings, in the order of the rows."""
        parts = list(batches([len(row.tokens) for row in rows], self._sizes.rows))
        found: list[list[tuple[float, bool]]] = [[]] * len(rows)
        with counting_bars() as begin:
            advance = begin(what, len(rows))
            answers = self._spread(score_rows, ([rows[number] for number in part] for part in parts))
            for part, scores in zip(parts, answers, strict=True):
                for number, score in zip(part, scores, strict=True):
                    found[number] = score
                advance(len(part))
        return found

    def _manner(self, task: str, asked: dict[str, Any]) -> "_Manner":
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MAX_NEW_TOKENS))
        sampled, max_new_tokens = settings["do_sample"], settings["max_gen_toks"]
        unknown = sorted(settings.keys() - _KNOWN - (set() if sampled else _OF_SAMPLING))
        if unknown:
            raise ConfigError(
                f"{task} asks for {', '.join(f'{name}={settings[name]}' for name in unknown)} in generation_kwargs; "
                f"continuations know {', '.join(sorted(_KNOWN))}; leave this task out, or override it in --task-dir."
            )
        if self._room(max_new_tokens) < max_new_tokens:
            self._shortened[task] = max_new_tokens
        return _Manner(
            until=tuple(text for text in settings["until"] if text),
            max_new_tokens=self._room(max_new_tokens),
            temperature=float(settings["temperature"]) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
        )

    def _room(self, max_new_tokens: int) -> int:
        """Tokens of a continuation: where it leaves no room for a prompt, each has half of what the model reads."""
        return max_new_tokens if max_new_tokens < self._max_length else max(1, self._max_length // 2)
