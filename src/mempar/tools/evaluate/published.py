"""Figures of "Memory Layers at Scale" (Berges et al., arXiv 2412.09764), as data.

Of the tables of the models of 1.3B and 8B and of those that compare architectures at 134M and 373M. All in percent, as
printed. Runs saw 1T tokens but where it is said. The paper does not say how many examples it shows. It reports exact
match for NaturalQuestions and F1 for TriviaQA; of HotPotQA it is not known here which of the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mempar.recipes.bases import BASES
from mempar.recipes.published import slots_label
from mempar.runtime.config import RunConfig

SOURCE = "Memory Layers at Scale, arXiv 2412.09764"
# The paper's tasks by the harness's names, or ours, and the metric that is compared.
METRICS = {
    "nq_open": "exact_match",
    "triviaqa": "exact_match",
    "piqa": "acc",
    "openbookqa": "acc",
    "hotpotqa_closed_book": "f1",
    "mmlu": "acc",
    "hellaswag": "acc",
    "humaneval": "pass@1",
    "mbpp": "pass_at_1",
}
# What differs from the harness's figures beside them.
CAVEATS = {
    "triviaqa": "the paper reports F1 for TriviaQA, the harness exact match, which is lower",
    "hotpotqa_closed_book": "whether the paper's figures for HotPotQA are F1 or exact match is not known here",
}
_QUESTIONS = ("nq_open", "triviaqa", "piqa", "openbookqa", "hotpotqa_closed_book")
_ALL = ("hellaswag", "hotpotqa_closed_book", "humaneval", "mbpp", "mmlu", "nq_open", "openbookqa", "piqa", "triviaqa")
_SMALL = ("nq_open", "triviaqa", "hotpotqa_closed_book")
_NAMES = {"dense": "dense", "moe": "experts", "peer": "PEER", "memory": "Memory", "memory_plus": "Memory+"}
_1M, _4M, _16M, _64M = (millions << 20 for millions in (1, 4, 16, 64))


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figures of one model.

    Attributes:
        base: name of the base model in recipes/bases.py.
        variant: `dense`, `moe`, `peer`, `memory` or `memory_plus`.
        slots: of the table; 0 without one.
        tokens: of training.
        figures: by task, in percent.
    """

    base: str
    variant: str
    slots: int
    tokens: str
    figures: Mapping[str, float]

    @property
    def model(self) -> str:
        """What a column of a table calls it."""
        slots = f" {slots_label(self.slots).upper()}" if self.variant.startswith("memory") else ""
        return f"{self.base} {_NAMES[self.variant]}{slots}" + (f", {self.tokens}" if self.tokens != "1T" else "")


def _row(base: str, variant: str, slots: int, tasks: Sequence[str], *figures: float, tokens: str = "1T") -> Published:
    named = dict(zip(tasks, figures, strict=True))
    return Published(base=base, variant=variant, slots=slots, tokens=tokens, figures=named)


# fmt: off
PUBLISHED = (
    _row("134m", "dense", 0, _SMALL, 0.91, 7.7, 5.18),
    _row("134m", "moe", 0, _SMALL, 2.49, 13.08, 7.80),
    _row("134m", "peer", 768**2, _SMALL, 2.46, 16.34, 8.82),
    _row("134m", "memory", _1M, _SMALL[:2], 2.1, 16.31),
    _row("134m", "memory_plus", _1M, _SMALL, 3.16, 18.77, 9.35),
    _row("373m", "dense", 0, _SMALL[:2], 2.58, 17.68),
    _row("373m", "moe", 0, _SMALL[:2], 3.99, 19.94),
    _row("373m", "peer", 768**2, _SMALL[:2], 5.1, 26.39),
    _row("373m", "memory_plus", _1M, _SMALL[:2], 5.76, 28.10),
    _row("1.3b", "dense", 0, _QUESTIONS, 7.76, 32.64, 72.74, 23.40, 13.92),
    _row("1.3b", "moe", 0, _QUESTIONS, 8.14, 31.46, 73.72, 25.20, 15.15),
    _row("1.3b", "peer", 768**2, _QUESTIONS, 12.33, 42.46, 73.34, 26.60, 15.39),
    _row("1.3b", "memory", _1M, _QUESTIONS, 9.83, 39.47, 72.29, 25.80, 15.46),
    _row("1.3b", "memory_plus", _1M, _QUESTIONS, 13.68, 42.89, 75.35, 26.80, 16.72),
    _row("1.3b", "memory_plus", _4M, _QUESTIONS, 14.43, 51.18, 75.03, 27.80, 18.59),
    _row("1.3b", "memory_plus", _16M, _QUESTIONS, 20.14, 58.67, 76.39, 26.80, 20.65),
    _row("1.3b", "memory_plus", _64M, _QUESTIONS, 20.78, 62.14, 77.31, 30.00, 20.47),
    _row("8b", "dense", 0, _ALL, 53.99, 20.41, 21.34, 30.80, 41.35, 18.61, 31.40, 78.02, 51.74, tokens="200B"),
    _row("8b", "memory_plus", _16M, _ALL, 54.33, 21.75, 23.17, 29.40, 50.14, 19.36, 30.80, 79.11, 57.64, tokens="200B"),
    _row("8b", "dense", 0, _ALL, 58.90, 25.26, 29.88, 44.20, 59.68, 25.24, 34.20, 80.52, 63.62),
    _row("8b", "memory_plus", _16M, _ALL, 60.29, 26.06, 31.71, 42.20, 63.04, 27.06, 34.40, 79.82, 68.15),
)
# fmt: on


def published_for(run: RunConfig) -> list[Published]:
    """The published models of a run's size: the dense one, and those of its own kind and number of slots."""
    shapes = {name: (base.model.hidden_size, base.model.num_layers) for name, base in BASES.items()}
    base = next((name for name, shape in shapes.items() if shape == (run.model.hidden_size, run.model.num_layers)), "")
    kind = _kind(run)
    return [one for one in PUBLISHED if base and one.base == base and (one.variant, one.slots) in (("dense", 0), kind)]


def _kind(run: RunConfig) -> tuple[str, int]:
    if run.memory.enabled:
        return run.memory.variant, run.memory.num_slots
    return ("moe" if run.moe.enabled else "dense"), 0
