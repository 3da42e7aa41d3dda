"""The plots of a study: accuracy against memory size, parameters, compute and steps; loss, kinds of facts, coverage.

Points are means over seeds, bars their standard deviations.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mempar.tools.page.axes import SERIES, legend_above, name_rows
from mempar.tools.page.plot import Plot
from mempar.tools.page.svg import INK, MUTED
from mempar.tools.study.comparison import Mean, Results, mean_of
from mempar.tools.study.results import Point
from mempar.tools.study.summary import short, title
from mempar.tools.study.variants import DENSE, MEMORY, MEMORY_PLUS, MOE, PEER, TOLERANCE, TWICE, Entrant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = dict(zip((MEMORY_PLUS, MEMORY, PEER, MOE), SERIES, strict=False)) | {DENSE: (INK, "o"), TWICE: (MUTED, "s")}
_LINES = {DENSE: "-", TWICE: "--"}
_HEIGHT, _ROW, _AROUND = 300.0, 34.0, 96.0


def all_plots(found: Results) -> list[Plot]:
    """What the page shows, in its order."""
    return [
        accuracy_by_slots(found),
        accuracy_by_params(found),
        _by_steps(found, "accuracy-by-steps", "facts recalled", _accuracy_of_point, _accuracy_title),
        accuracy_by_compute(found),
        _by_steps(found, "loss-by-steps", "nats a token of an answer", _loss_of_point, _loss_title),
        coverage_by_slots(found),
        accuracy_by_kind(found),
    ]


def accuracy_by_slots(found: Results) -> Plot:
    """Draw recall against the size of the table, with what models without one recall as lines."""
    name, tables = "accuracy-by-slots", [*found.of_variant(MEMORY_PLUS), *found.of_variant(MEMORY)]
    if not tables:
        return Plot(name=name, title="No model with a memory has been run: there is no size to compare.")

    def paint(axes: "Axes") -> None:
        for variant in (MEMORY_PLUS, MEMORY):
            sizes = found.of_variant(variant)
            _series(axes, [each.slots for each in sizes], [found.recall(each) for each in sizes], variant)
        for variant in (PEER, MOE):
            matched = found.of_variant(variant)
            _series(axes, [each.slots for each in matched], [found.recall(each) for each in matched], variant)
        for variant in (DENSE, TWICE):
            for entrant in found.of_variant(variant):
                _level(axes, found.recall(entrant), variant)
        _slots_axis(axes, tables)
        axes.set_ylabel("facts recalled")
        axes.set_ylim(bottom=0)
        legend_above(axes, 3, narrow=True)

    best = max(tables, key=lambda each: found.recall(each).value)
    dense = found.of_variant(DENSE)
    beside = f", dense {found.recall(dense[0]).value:.0%}" if dense else ""
    return Plot(
        name=name,
        title=f"Recall by size of the table: up to {found.recall(best).value:.0%} ({title(best, found)}){beside}",
        note=f"FLOPs a token are equal to {TOLERANCE:.0%}, but for dense 2x. PEER and MoE stand where a Memory+ has "
        "their parameters.",
        paint=paint,
        height=_HEIGHT,
    )


def accuracy_by_params(found: Results) -> Plot:
    """Draw recall against all parameters."""

    def paint(axes: "Axes") -> None:
        for variant in _variants(found):
            models = found.of_variant(variant)
            _series(
                axes,
                [found.runs(each)[0].params for each in models],
                [found.recall(each) for each in models],
                variant,
            )
        _params_axis(axes, [found.runs(each)[0].params for each in found.entrants])
        axes.set_ylabel("facts recalled")
        axes.set_ylim(bottom=0)
        legend_above(axes, 3, narrow=True)

    best = max(found.entrants, key=lambda each: found.recall(each).value)
    return Plot(
        name="accuracy-by-params",
        title=f"Recall by parameters: up to {found.recall(best).value:.0%} with "
        f"{found.runs(best)[0].params / 1e6:.2f}M ({title(best, found)})",
        note="Parameters of tables, and of experts that a token is not sent to, cost no FLOPs.",
        paint=paint,
        height=_HEIGHT,
    )


def accuracy_by_compute(found: Results) -> Plot:
    """Draw recall against the FLOPs that training has taken so far."""
    chosen = one_of_each(found)

    def paint(axes: "Axes") -> None:
        for entrant in chosen:
            one = found.runs(entrant)[0]
            cost = one.flops_per_token * one.tokens / one.steps / 1e12
            steps, means = _curve(found, entrant, _accuracy_of_point)
            _band(axes, [step * cost for step in steps], means, entrant.variant, title(entrant, found))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel("training TFLOP")
        axes.set_ylabel("facts recalled")
        axes.set_ylim(bottom=0)
        legend_above(axes, 2, narrow=True)

    return Plot(
        name="accuracy-by-compute",
        title=f"Recall by compute: {_compute_title(found)}",
        note="As far as it has been spent at an evaluation; bands are standard deviations over seeds.",
        paint=paint,
        height=_HEIGHT,
    )


def coverage_by_slots(found: Results) -> Plot:
    """Draw which share of the slots is read."""
    name = "coverage-by-slots"
    tables = [each for each in found.entrants if found.runs(each)[0].coverage is not None]
    if not tables:
        return Plot(name=name, title="No model with a table has been run: there is no coverage.")

    def paint(axes: "Axes") -> None:
        for variant in (MEMORY_PLUS, MEMORY, PEER):
            models = [each for each in tables if each.variant == variant]
            _series(axes, [each.slots for each in models], [_covered(found, each) for each in models], variant)
        _slots_axis(axes, tables)
        axes.set_ylabel("slots read")
        axes.set_ylim(0, 1.05)
        legend_above(axes, 3, narrow=True)

    least = min(tables, key=lambda each: _covered(found, each).value)
    return Plot(
        name=name,
        title=f"Coverage: {_covered(found, least).value:.0%} of the slots are read, or more ({title(least, found)})",
        note="Shares of the slots that were read since the evaluation before the last one.",
        paint=paint,
        height=_HEIGHT,
    )


def accuracy_by_kind(found: Results) -> Plot:
    """Draw recall of each kind of facts."""
    chosen = one_of_each(found)
    kinds = list(dict.fromkeys(kind for result in found.all for kind in result.by_kind))

    def paint(axes: "Axes") -> None:
        for place, entrant in enumerate(chosen):
            colour, marker = _STYLES[entrant.variant]
            shift = 0.6 * ((place + 0.5) / len(chosen) - 0.5)
            means = [found.mean(entrant, lambda run, kind=kind: run.by_kind.get(kind, 0.0)) for kind in kinds]
            axes.errorbar(
                [mean.value for mean in means],
                [row + shift for row in range(len(kinds))],
                xerr=[mean.deviation for mean in means],
                fmt=marker,
                markersize=5.5,
                color=colour,
                label=title(entrant, found),
            )
        name_rows(axes, kinds, "facts recalled")
        axes.set_xlim(-0.02, 1.02)
        legend_above(axes, 3, narrow=True)

    return Plot(
        name="accuracy-by-kind",
        title="Recall by kind of fact",
        note="Of every variant the model that recalls most. Blocks and categories can be told from their neighbours'.",
        paint=paint,
        height=_AROUND + _ROW * len(kinds),
        wide=True,
    )


def _by_steps(
    found: Results, name: str, quantity: str, figure: Callable[[Point], float], heading: Callable[[Results], str]
) -> Plot:
    chosen = one_of_each(found)

    def paint(axes: "Axes") -> None:
        for entrant in chosen:
            steps, means = _curve(found, entrant, figure)
            _band(axes, steps, means, entrant.variant, title(entrant, found))
        axes.set_xlabel("training steps")
        axes.set_ylabel(quantity)
        axes.set_ylim(bottom=0)
        legend_above(axes, 2, narrow=True)

    return Plot(
        name=name,
        title=heading(found),
        note="Of every variant the model that recalls most; bands are standard deviations over seeds.",
        paint=paint,
        height=_HEIGHT,
    )


def one_of_each(found: Results) -> list[Entrant]:
    """Of every variant the model that recalls most, of those with the most seeds."""
    return [best for variant in _variants(found) if (best := found.best_of(variant)) is not None]


def _variants(found: Results) -> list[str]:
    return list(dict.fromkeys(entrant.variant for entrant in found.entrants))


def _curve(found: Results, entrant: Entrant, figure: Callable[[Point], float]) -> tuple[list[int], list[Mean]]:
    """A figure at the steps that all seeds of a model have."""
    curves = [{point.step: figure(point) for point in result.curve} for result in found.runs(entrant)]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [mean_of([curve[step] for curve in curves]) for step in steps]


def _series(axes: "Axes", places: list[int], means: list[Mean], variant: str) -> None:
    if not places:
        return
    colour, marker = _STYLES[variant]
    axes.errorbar(
        places,
        [mean.value for mean in means],
        yerr=[mean.deviation for mean in means],
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.8,
        capsize=3,
        label=short(variant),
    )


def _level(axes: "Axes", mean: Mean, variant: str) -> None:
    colour, _ = _STYLES[variant]
    axes.axhline(mean.value, color=colour, linestyle=_LINES[variant], linewidth=1.6, label=short(variant))
    axes.axhspan(mean.value - mean.deviation, mean.value + mean.deviation, color=colour, alpha=0.12, linewidth=0)


def _band(axes: "Axes", places: list[int] | list[float], means: list[Mean], variant: str, label: str) -> None:
    colour, marker = _STYLES[variant]
    values = [mean.value for mean in means]
    low, high = ([mean.value + sign * mean.deviation for mean in means] for sign in (-1, 1))
    axes.plot(
        places,
        values,
        color=colour,
        linestyle=_LINES.get(variant, "-"),
        linewidth=1.8,
        marker=marker,
        markersize=3.5,
        label=label,
    )
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _slots_axis(axes: "Axes", tables: list[Entrant]) -> None:
    slots = sorted({each.slots for each in tables})
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots, [f"{number:,}" for number in slots])
    axes.minorticks_off()
    axes.set_xlabel("slots of the table")


def _params_axis(axes: "Axes", params: list[int]) -> None:
    """A logarithmic axis, with the round numbers 1, 2 and 5 of each power of ten that lie in it."""
    axes.set_xscale("log")
    low, high = (float(end) for end in axes.get_xlim())
    powers = range(len(str(min(params))) - 2, len(str(max(params))) + 1)
    round_numbers = [digit * 10**power for power in powers for digit in (1, 2, 5)]
    ticks = [tick for tick in round_numbers if low <= tick <= high] or [params[0]]
    axes.set_xticks(ticks, [f"{tick / 1e6:.3g}M" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters, tables included")


def _covered(found: Results, entrant: Entrant) -> Mean:
    return found.mean(entrant, lambda run: run.coverage or 0.0)


def _accuracy_of_point(point: Point) -> float:
    return point.accuracy


def _loss_of_point(point: Point) -> float:
    return point.answer_loss


def _accuracy_title(found: Results) -> str:
    best = max(found.entrants, key=lambda each: found.recall(each).value)
    return f"Recall by steps: up to {found.recall(best).value:.0%} at the end ({title(best, found)})"


def _loss_title(found: Results) -> str:
    least = min(found.entrants, key=lambda each: found.mean(each, lambda run: run.answer_loss).value)
    loss = found.mean(least, lambda run: run.answer_loss).value
    return f"Loss on answers: down to {loss:.2f} at the end ({title(least, found)})"


def _compute_title(found: Results) -> str:
    twice, best = found.of_variant(TWICE), found.best_of(MEMORY_PLUS)
    if not twice or best is None:
        return "as it is spent"
    points = round(100 * (found.recall(best).value - found.recall(twice[0]).value))
    how = f"{abs(points)} points {'above' if points > 0 else 'below'}" if points else "level with"
    return f"{title(best, found)} end {how} dense of twice the compute"
