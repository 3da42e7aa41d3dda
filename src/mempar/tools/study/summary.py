"""What the results show, in one paragraph: who recalls more, by how much, and where memory does not help.

Differences are taken seed by seed; one is called clear when its 95% interval by Student's t leaves out 0, and is said
to be none otherwise. With one seed nothing is clear, and the paragraph says so. Memory+ is compared with its largest
table, which is known beforehand: the best of several would look better than it is.
"""

from collections.abc import Callable, Sequence

from mempar.tools.study.comparison import Difference, Results, accuracy_of
from mempar.tools.study.results import Result
from mempar.tools.study.variants import DENSE, MEMORY, MEMORY_PLUS, MOE, PARAMS_TOLERANCE, PEER, TWICE, Entrant

_NAMES = {
    DENSE: "the dense model",
    TWICE: "the dense model of twice the compute",
    MOE: "experts",
    PEER: "PEER",
    MEMORY: "Memory",
    MEMORY_PLUS: "Memory+",
}
_SHORT = {
    DENSE: "dense",
    TWICE: "dense, 2x compute",
    MOE: "MoE",
    PEER: "PEER",
    MEMORY: "Memory",
    MEMORY_PLUS: "Memory+",
}


def summarise(results: Sequence[Result]) -> str:
    """Say what results show.

    Args:
        results: of a study, at least one.
    """
    found = Results(results)
    seeds = sorted({len(found.runs(entrant)) for entrant in found.entrants})
    one = found.all[0]
    said = [
        f"After {one.steps:,} steps ({_tokens(one.tokens)} tokens), asked in a wording that a fact was never told "
        f"in{_of_seeds(seeds)}:"
    ]
    dense = Entrant(variant=DENSE)
    plus = found.largest_of(MEMORY_PLUS)
    if dense in found.entrants and plus:
        said += _against_dense(found, dense, plus)
    said += _with_equal_parameters(found)
    said += _by_size(found)
    said += _limits(found, dense)
    if len(said) == 1:
        said.append("; ".join(f"{title(entrant, found)} {_share(found, entrant)}" for entrant in found.entrants) + ".")
    if seeds[0] == 1:
        said.append("One seed does not tell a difference from chance.")
    if skipped := [run.skipped for run in found.all if run.skipped]:
        said.append(f"{sum(skipped):,} steps of {len(skipped)} runs changed nothing: gradients were not finite.")
    return " ".join(said)


def title(entrant: Entrant, found: Results) -> str:
    """A model as plots and tables name it, among others."""
    if entrant.variant in (MEMORY, MEMORY_PLUS):
        return f"{short(entrant.variant)}, {entrant.slots:,} slots"
    if len(found.of_variant(entrant.variant)) > 1:
        return f"{short(entrant.variant)}, as {entrant.slots:,} slots"
    return short(entrant.variant)


def short(variant: str) -> str:
    """A variant as plots and tables name it."""
    return _SHORT[variant]


def _against_dense(found: Results, dense: Entrant, plus: Entrant) -> list[str]:
    said = [
        f"{_name(plus)} recalls {_share(found, plus)} of the facts and {_NAMES[DENSE]} of as many FLOPs a token "
        f"{_share(found, dense)}, {_phrase(found.difference(plus, dense, accuracy_of))}."
    ]
    twice = Entrant(variant=TWICE)
    if twice in found.entrants:
        said.append(
            f"{_capital(_NAMES[TWICE])} recalls {_share(found, twice)}: against it {_name(plus)} has "
            f"{_phrase(found.difference(plus, twice, accuracy_of))}."
        )
    return said


def _with_equal_parameters(found: Results) -> list[str]:
    """Against what has the parameters of a Memory+."""
    said = []
    for variant in (MOE, PEER):
        for entrant in found.of_variant(variant):
            plus = Entrant(variant=MEMORY_PLUS, slots=entrant.slots)
            if plus in found.entrants and _are_as_large(found, entrant, plus):
                said.append(
                    f"With as many parameters {_NAMES[variant]} recall{'s' if variant == PEER else ''} "
                    f"{_share(found, entrant)} and {_name(plus)} {_share(found, plus)}, "
                    f"{_phrase(found.difference(plus, entrant, accuracy_of))}."
                )
    return said


def _are_as_large(found: Results, one: Entrant, other: Entrant) -> bool:
    params, wanted = (found.runs(each)[0].params for each in (one, other))
    return abs(params - wanted) <= PARAMS_TOLERANCE * wanted


def _by_size(found: Results) -> list[str]:
    said = []
    for variant in (MEMORY_PLUS, MEMORY):
        tables = found.of_variant(variant)
        if len(tables) > 1:
            small, large = tables[0], tables[-1]
            said.append(
                f"From {small.slots:,} to {large.slots:,} slots {_NAMES[variant]} goes from {_share(found, small)} to "
                f"{_share(found, large)}, {_phrase(found.difference(large, small, accuracy_of))}."
            )
    return said


def _limits(found: Results, dense: Entrant) -> list[str]:
    """Where memory does not help: models, kinds of facts, and how long it takes."""
    if dense not in found.entrants:
        return []
    said = []
    tables = [*found.of_variant(MEMORY), *found.of_variant(MEMORY_PLUS)]
    compared = {each: found.difference(each, dense, accuracy_of) for each in tables}
    without = [each for each, by in compared.items() if by is not None and by.count > 1 and by.value <= by.margin]
    if without:
        said.append(f"Not clearly above {_NAMES[DENSE]}: {_listed([_name(each) for each in without])}.")
    if plus := found.largest_of(MEMORY_PLUS):
        said += _kinds_without(found, dense, plus)
        said += _time_taken(found, dense, plus)
    return said


def _time_taken(found: Results, dense: Entrant, plus: Entrant) -> list[str]:
    """How much longer a model took; on a CPU by processor time, which runs side by side do not make longer."""
    on_cpu = all(run.device == "cpu" for each in (plus, dense) for run in found.runs(each))
    seconds = [found.mean(each, lambda run: run.cpu_seconds if on_cpu else run.seconds).value for each in (plus, dense)]
    if not all(seconds):
        return []
    what = "the processor time of" if on_cpu else "as long as"
    return [f"{_name(plus)} took {seconds[0] / seconds[1]:.1f} times {what} {_NAMES[DENSE]} here."]


def _kinds_without(found: Results, dense: Entrant, plus: Entrant) -> list[str]:
    """Kinds of facts of which a model does not clearly recall more."""
    kinds = found.runs(plus)[0].by_kind
    compared = {kind: found.difference(plus, dense, _of_kind(kind)) for kind in kinds}
    without = [kind for kind, by in compared.items() if by is not None and by.count > 1 and by.value <= by.margin]
    if not without:
        return []
    return [f"It is not clearly better than that at these kinds of facts: {_listed(without)}."]


def _of_kind(kind: str) -> Callable[[Result], float]:
    return lambda result: result.by_kind.get(kind, 0.0)


def _share(found: Results, entrant: Entrant) -> str:
    mean = found.recall(entrant)
    return f"{mean.value:.1%}" + (f" (±{100 * mean.deviation:.1f})" if mean.count > 1 else "")


def _phrase(by: Difference | None) -> str:
    """A difference in words: clear, none that is clear, or of one seed."""
    if by is None:
        return "with no seed in common"
    points = f"{abs(100 * by.value):.1f} points {'more' if by.value >= 0 else 'fewer'}"
    if points.startswith("0.0 "):
        points = "as many"
    if by.count == 1:
        return f"{points} (one seed)"
    interval = f"95% interval {100 * (by.value - by.margin):+.1f} to {100 * (by.value + by.margin):+.1f}"
    return f"{points} ({interval})" if by.is_clear else f"no clear difference ({points}, {interval})"


def _name(entrant: Entrant) -> str:
    return f"{_NAMES[entrant.variant]} with {entrant.slots:,} slots" if entrant.slots else _NAMES[entrant.variant]


def _of_seeds(seeds: Sequence[int]) -> str:
    """How many there are of each model, fewest first, for the head of the paragraph."""
    if seeds[-1] == 1:
        return ""
    counts = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return f" (means of {counts} seeds, ± their standard deviation)"


def _tokens(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
