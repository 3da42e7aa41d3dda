"""Models of a study compared: means over seeds, and differences with their 95% intervals."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from mempar.tools.study.results import Result, in_order
from mempar.tools.study.variants import Entrant

# Two-sided 95% quantiles: of Student's t by degrees of freedom, and the normal one, which follows.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z95 = 1.959964


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        deviation: standard deviation of a seed; 0 with one.
        count: seeds.
    """

    value: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.deviation:.3f}" if self.count > 1 else f"{self.value:.3f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher one model's figure is than another's, with the same seeds.

    Attributes:
        value: mean of the differences by seed.
        margin: half of its 95% interval, by Student's t; infinite with one seed.
        count: seeds.
    """

    value: float
    margin: float
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.margin


class Results:
    """The results of a study, by model."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.all = in_order(results)
        self._of: defaultdict[Entrant, list[Result]] = defaultdict(list)
        for result in self.all:
            self._of[result.entrant].append(result)

    @property
    def entrants(self) -> list[Entrant]:
        """Models that have results, in order."""
        return list(self._of)

    def of_variant(self, variant: str) -> list[Entrant]:
        """Its models that have results, small tables first."""
        return [entrant for entrant in self._of if entrant.variant == variant]

    def runs(self, entrant: Entrant) -> list[Result]:
        """Results of a model, one a seed."""
        return self._of.get(entrant, [])

    def mean(self, entrant: Entrant, figure: Callable[[Result], float]) -> Mean:
        """Join a figure of a model's runs, of which there are some."""
        return mean_of([figure(result) for result in self.runs(entrant)])

    def recall(self, entrant: Entrant) -> Mean:
        """Share of all facts that a model recalls."""
        return self.mean(entrant, accuracy_of)

    def best_of(self, variant: str) -> Entrant | None:
        """Of its models with the most seeds the one that recalls most; None where there is none."""
        return max(
            self.of_variant(variant), key=lambda each: (len(self.runs(each)), self.recall(each).value), default=None
        )

    def largest_of(self, variant: str) -> Entrant | None:
        """Of its models with the most seeds the one with the largest table; None where there is none."""
        return max(self.of_variant(variant), key=lambda each: (len(self.runs(each)), each.slots), default=None)

    def difference(self, one: Entrant, other: Entrant, figure: Callable[[Result], float]) -> Difference | None:
        """Compare a figure of two models over the seeds that both have; None where there are none."""
        others = {result.seed: figure(result) for result in self.runs(other)}
        found = [figure(result) - others[result.seed] for result in self.runs(one) if result.seed in others]
        if not found:
            return None
        mean = mean_of(found)
        margin = math.inf
        if mean.count > 1:
            margin = _t95(mean.count - 1) * mean.deviation / math.sqrt(mean.count)
        return Difference(value=mean.value, margin=margin, count=mean.count)


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean and standard deviation of at least one number."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return Mean(value=statistics.fmean(numbers), deviation=deviation, count=len(numbers))


def accuracy_of(result: Result) -> float:
    """What is compared first of all."""
    return result.accuracy


def _t95(freedom: int) -> float:
    """Quantile by degrees of freedom; beyond the table by its expansion about the normal one, to four digits."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    first = (_Z95**3 + _Z95) / 4
    second = (5 * _Z95**5 + 16 * _Z95**3 + 3 * _Z95) / 96
    third = (3 * _Z95**7 + 19 * _Z95**5 + 17 * _Z95**3 - 15 * _Z95) / 384
    return _Z95 + first / freedom + second / freedom**2 + third / freedom**3
